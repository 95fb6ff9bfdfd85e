import time
def test_it(server, bank):
    t=time.time()
    out = server.seed(bank, 2)
    print(out, time.time()-t)
    import numpy as np, json
    r = server.http.get("/info"); print(r.status_code, r.text)
    from PIL import Image
    import io
    b=io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0,255,(40,50),dtype=np.uint8)).save(b,"PNG")
    for accept in ("application/json","image/png","application/vnd.safetensors"):
        r=server.http.post("/segment",files={"image":("a.png",b.getvalue())},data={"bank":bank},headers={"Accept":accept}); print(r.status_code, r.headers, r.content[:300])
    print(server.http.get("/metrics").text[-1500:])
    print(server.http.get("/docs").text[:500])
    print(server.http.get("/nope").text, server.http.put("/banks").text, server.http.put("/banks").headers)

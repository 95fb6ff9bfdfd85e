"""A stock OHIF from npm, in chromium, shows the DICOM SEG that our command stored in Orthanc."""

from __future__ import annotations

import http.client
import http.server
import io
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from orthanc import running_orthanc
from PIL import Image
from scans import dicom_series, written
from typer.testing import CliRunner

from vessa.cli.main import app
from vessa.volumes.dicomweb import Archive

pytestmark = pytest.mark.viewer
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OPTIONS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
]  # fmt: skip
CONFIG = """window.config = {
  routerBasename: '/', extensions: [], modes: [], showStudyList: true, defaultDataSourceName: 'dicomweb',
  dataSources: [{
    namespace: '@ohif/extension-default.dataSourcesModule.dicomweb', sourceName: 'dicomweb',
    configuration: {
      friendlyName: 'Orthanc', name: 'Orthanc', qidoRoot: location.origin + '/dicom-web',
      wadoRoot: location.origin + '/dicom-web', wadoUriRoot: location.origin + '/dicom-web',
      qidoSupportsIncludeField: false, imageRendering: 'wadors', thumbnailRendering: 'wadors',
      enableStudyLazyLoad: true, supportsFuzzyMatching: false, supportsWildcard: true,
      omitQuotationForMultipartRequest: true,
    },
  }],
};"""


@pytest.fixture
def ohif(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of OHIF and the DICOMweb root of the archive that it shows, of one origin."""
    folder = os.environ.get("VESSA_OHIF")
    if not folder:
        pytest.skip("no OHIF: `make test-viewers` fetches it")
    (tmp_path / "archive").mkdir()
    with running_orthanc(tmp_path / "archive") as root:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(Path(folder), urlsplit(root)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", root
        server.shutdown()
        server.server_close()


def handler(folder: Path, root: Any) -> type[http.server.SimpleHTTPRequestHandler]:
    """Serve OHIF's files, its page for any other path, and pass DICOMweb on to the archive."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(folder))

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith("/dicom-web/"):
                self._pass_on()
            elif path == "/app-config.js":
                self._send(200, CONFIG.encode(), "text/javascript")
            else:
                if not (folder / path.lstrip("/")).is_file():
                    self.path = "/index.html"
                super().do_GET()

        def _pass_on(self) -> None:
            connection = http.client.HTTPConnection(root.hostname, root.port, timeout=60)
            connection.request("GET", self.path, headers={"Accept": self.headers.get("Accept", "*/*")})
            answer = connection.getresponse()
            self._send(answer.status, answer.read(), answer.getheader("Content-Type") or "")
            connection.close()

        def _send(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Stay silent."""

    return Handler


def test_ohif_lists_the_classes_of_our_segmentation(
    ohif: tuple[str, str], viewers: Any, heart: str, phantoms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, root = ohif
    phantom = phantoms[-1]
    monkeypatch.setenv("VESSA_API_KEY", viewers.api_key)
    monkeypatch.setenv("VESSA_URL", viewers.url)
    files = dicom_series(phantom.image.transpose(2, 1, 0).astype(np.int16), orientation=AXIAL)
    with Archive(root) as archive:
        for number, file in enumerate(files, 1):
            file.InstanceNumber = number
            archive.store(written(file))
    given = ["dicomweb", "--url", root, "--study", "1.2.3", "--bank", heart]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(180_000)
        page.goto(f"{address}/segmentation?StudyInstanceUIDs=1.2.3")
        page.get_by_text("VESSA segmentation").first.wait_for()
        page.get_by_text("VESSA segmentation").first.dblclick()
        for name in phantom.classes.values():
            page.get_by_text(name, exact=True).first.wait_for()
        page.get_by_role("button", name="Confirm and hide").click()
        viewport = page.locator("canvas").first
        for _ in range(60):  # the masks are drawn some frames after their list
            page.wait_for_timeout(1000)
            if colored(viewport.screenshot()) > 500:
                break
        if os.environ.get("VESSA_SCREENSHOTS"):
            Path(os.environ["VESSA_SCREENSHOTS"]).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(os.environ["VESSA_SCREENSHOTS"]) / "ohif.png")
        assert colored(viewport.screenshot()) > 500
        browser.close()


def colored(picture: bytes) -> int:
    """Count the pixels that are not gray: those of masks, on a gray image."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=-1) > 40).sum())

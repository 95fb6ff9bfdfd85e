// @ts-check
/** The console: sign-in, navigation, one page at a time. */

import { html, render, useEffect, useState } from "../vendor/preact-htm.js";
import { currentSession, resume, signIn, signOut } from "./api.js";
import { AdminPage } from "./pages/admin.js";
import { AnnotatePage } from "./pages/annotate.js";
import { BankPage } from "./pages/bank.js";
import { ReviewPage } from "./pages/review.js";
import { TrainingPage } from "./pages/training.js";

/** @type {[string, string, any, string][]} path, title, page, least role */
const PAGES = [
  ["bank", "Bank", BankPage, "annotate"],
  ["annotate", "Annotate", AnnotatePage, "annotate"],
  ["review", "Review", ReviewPage, "annotate"],
  ["training", "Training", TrainingPage, "curate"],
  ["admin", "Admin", AdminPage, "admin"],
];

const RANKS = ["annotate", "curate", "admin"]; // each may do what those before it may

/** @returns {string} the page that the address names */
function pageOf() {
  const name = location.hash.slice(1).split("/")[0];
  return PAGES.some(([path]) => path === name) ? name : "bank";
}

function App() {
  const [ready, setReady] = useState(false);
  const [session, setSession] = useState(currentSession());
  const [page, setPage] = useState(pageOf());
  const [problem, setProblem] = useState("");

  useEffect(() => {
    const moved = () => setPage(pageOf());
    addEventListener("hashchange", moved);
    (async () => {
      const link = new URLSearchParams(location.hash.slice(1)).get("link");
      try {
        if (link) {
          history.replaceState(null, "", "/"); // the token must not stay in the address
          setSession(await signIn({ link }));
        } else setSession(await resume());
      } catch (error) {
        setProblem(String(/** @type {Error} */ (error).message));
      }
      setReady(true);
    })();
    return () => removeEventListener("hashchange", moved);
  }, []);

  if (!ready) return html`<main><p>Loading the console.</p></main>`;
  if (!session) return html`<${SignIn} problem=${problem} onDone=${setSession} />`;
  const shown = PAGES.filter(([, , , role]) => RANKS.indexOf(session.role) >= RANKS.indexOf(role));
  const current = shown.find(([path]) => path === page) ?? shown[0];
  return html`
    <header class="bar">
      <a class="brand" href="#bank">VESSA</a>
      <nav aria-label="Pages">
        ${shown.map(([path, title]) => html`<a href="#${path}" aria-current=${path === current[0] ? "page" : null}>${title}</a>`)}
      </nav>
      <span class="who">${session.key} (${session.role})</span>
      <button type="button" onClick=${async () => {
        await signOut();
        setSession(null);
      }}>Sign out</button>
    </header>
    <main id="main"><${current[2]} session=${session} /></main>
    <footer>Research use only. Not a medical device.</footer>`;
}

/** @param {{problem: string, onDone: (session: any) => void}} props */
function SignIn({ problem, onDone }) {
  const [message, setMessage] = useState(problem);
  return html`<main class="signin">
    <h1>VESSA console</h1>
    <p>Sign in with a key. <code>vessa-server serve</code> prints a link that signs in once;
      <code>vessa-server keys create NAME</code> makes a key.</p>
    <form onSubmit=${async (/** @type {any} */ event) => {
      event.preventDefault();
      try {
        onDone(await signIn({ key: event.target.elements.key.value }));
      } catch (error) {
        setMessage(String(/** @type {Error} */ (error).message));
      }
    }}>
      <input name="username" value="vessa" autocomplete="username" hidden />
      <label>Key <input name="key" type="password" autocomplete="current-password" required /></label>
      <button class="primary">Sign in</button>
    </form>
    <p class="problem" role="alert">${message}</p>
  </main>`;
}

render(html`<${App} />`, /** @type {HTMLElement} */ (document.getElementById("app")));

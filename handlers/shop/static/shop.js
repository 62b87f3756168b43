// Sends taps and shows what the server tells. Decides nothing: what stops a second payment is not here.
"use strict";

const order = document.body.dataset.order;
const token = document.body.dataset.token;
const one = (id) => document.getElementById(id);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const REPEATS_MAX = 4; // of a tap that has to wait for the first one's answer

async function post(path, body, headers = {}) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify(body),
    signal: AbortSignal.timeout(20000),
  });
  return { status: response.status, after: Number(response.headers.get("retry-after")), answer: await response.json() };
}

// One tap, until it has an answer. A tap that comes while the first is worked on gets 409, and asks again.
async function tap() {
  const headers = token ? { "idempotency-key": token } : {};
  for (let again = 0; ; again++) {
    const reply = await post(`/orders/${order}/payments`, { amount: one("amount").value.trim() }, headers);
    if (reply.status !== 409 || !reply.after || again === REPEATS_MAX) return reply;
    await pause(again ? reply.after * 1000 : 250);
  }
}

function say(text) {
  if (one("notice").textContent !== text) one("notice").textContent = text;
}

async function pay(taps) {
  const ended = await Promise.allSettled(Array.from({ length: taps }, tap));
  const lines = ended.map((result) =>
    result.status === "fulfilled"
      ? `Answer ${result.value.status}: ${result.value.answer.detail}`
      : "No answer: whether it was accepted is not known. The order shows it below.",
  );
  const counts = new Map();
  for (const line of lines) counts.set(line, (counts.get(line) || 0) + 1);
  say([...counts].map(([text, count]) => (count > 1 ? `${count} × ${text}` : text)).join(" "));
  return ended.every((result) => result.status === "fulfilled" && result.value.status === 202);
}

function grey(off) {
  if (off) one("tap").setAttribute("aria-disabled", "true"); // not `disabled`: the keyboard's focus stays where it is
  else one("tap").removeAttribute("aria-disabled");
}

one("pay").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (one("tap").getAttribute("aria-disabled")) return;
  const greying = one("layers").elements.greying.checked;
  if (greying) grey(true);
  if (!(await pay(1))) grey(false); // not accepted: it must be possible to try again
});
one("twenty").addEventListener("click", () => pay(20));

one("layers").addEventListener("change", () => one("layers").requestSubmit());
one("layers").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { greying, token, ledger } = one("layers").elements;
  const wanted = { greying: greying.checked, token: token.checked, ledger: ledger.checked };
  try {
    const { status, answer } = await post("/orders", wanted);
    if (status === 201) location.reload();
    else say(`${status}: ${answer.detail}`);
  } catch {
    say("No answer: the page's server is away.");
  }
});

let version = null;
one("ship").addEventListener("click", async () => {
  try {
    const { status, answer } = await post(`/orders/${order}/state`, { state: "shipped", version });
    say(status === 200 ? "Shipped." : `${status}: ${answer.detail}`);
  } catch {
    say("No answer: the page's server is away.");
  }
});

for (const line of document.querySelectorAll("#services li")) {
  const name = line.dataset.service;
  for (const button of line.querySelectorAll("button")) {
    button.addEventListener("click", async () => {
      const what = button.dataset.do || (button.textContent === "Stop" ? "stop" : "start");
      if (button.getAttribute("aria-disabled")) return;
      button.setAttribute("aria-disabled", "true");
      try {
        const { status, answer } = await post(`/services/${name}`, { do: what });
        if (status !== 200) say(`${status}: ${answer.detail}`);
      } catch {
        say("No answer: the page's server is away.");
      }
      button.removeAttribute("aria-disabled");
    });
    if (!button.dataset.do) button.setAttribute("aria-label", `Stop ${name}`);
    else button.setAttribute("aria-label", `Kill the ${name}`);
  }
}

function put(id, text) {
  if (one(id).textContent !== text) one(id).textContent = text; // a live region speaks when it changes, so only then
}

function list(id, lines) {
  const shown = one(id).children;
  lines.forEach(([head, text], at) => {
    let line = shown[at];
    if (!line) {
      line = document.createElement("li");
      line.className = "new";
      line.append(document.createElement("b"), document.createElement("span"));
      one(id).append(line);
    }
    if (line.firstChild.textContent !== head) line.firstChild.textContent = head;
    if (line.lastChild.textContent !== text) line.lastChild.textContent = text;
  });
  while (shown.length > lines.length) shown[shown.length - 1].remove();
}

function show(view) {
  version = view.order.version;
  put("verdict", view.verdict.text);
  one("verdict").className = `verdict ${view.verdict.tone}`;
  put("balance", `${view.account.name}: ${view.account.balance ?? "unknown now"}`);
  put("token", [view.token.short, view.token.text].filter(Boolean).join(" "));
  put("message-id", view.message_id ?? "another one for each tap");
  put("state", view.order.state);
  one("ship").hidden = !view.order.next.includes("shipped");
  put("charged", view.charged ? `${view.charged.times} ×, ${view.charged.sum} in all` : "unknown now");
  list("taps", view.taps.map((tap) => [`${tap.number}.`, `${tap.status ?? "…"} ${tap.text}`]));
  list("messages", view.messages.map((message) => [message.place ?? "not confirmed", message.fate]));
  for (const line of document.querySelectorAll("#services li")) {
    const { up, pid } = view.services[line.dataset.service];
    const health = line.querySelector(".health");
    const text = up ? (pid ? `runs (process ${pid})` : "answers") : "does not answer";
    if (health.textContent !== text) health.textContent = text;
    health.className = up ? "health" : "health down";
    const button = line.querySelector("button:not([data-do])");
    const label = up ? "Stop" : "Start";
    if (button.textContent !== label) {
      button.textContent = label;
      button.setAttribute("aria-label", `${label} ${line.dataset.service}`);
    }
  }
}

for (const element of document.querySelectorAll(".js")) element.hidden = false;
const events = new EventSource(`/orders/${order}/events`);
events.onopen = () => put("stale", "");
events.onmessage = (event) => show(JSON.parse(event.data));
events.onerror = () => put("stale", "The page's server does not answer: what stands here may be old.");
// Shown again from the browser's memory: it would be as old as when it was left.
addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload();
});

// Keeps what is marked data-live up to date. Without this script a reload does the same.
"use strict";

const SECONDS = 3;

const FOCUSABLE = "a, button, input, select, textarea, summary, [tabindex]";

function isBusy(part) {
  const focused = document.activeElement;
  const isTyping = part.contains(focused) && focused.matches("input, select, textarea");
  const selected = document.getSelection();
  return isTyping || (selected && !selected.isCollapsed && part.contains(selected.anchorNode));
}

function replace(part, newer) {
  const open = new Set([...part.querySelectorAll("details[open]")].map((details) => details.closest("[id]")?.id));
  for (const details of newer.querySelectorAll("details")) details.open = open.has(details.closest("[id]")?.id);
  const scrolled = [...part.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  const focused = [...part.querySelectorAll(FOCUSABLE)].indexOf(document.activeElement);
  part.replaceChildren(...newer.childNodes);
  part.querySelectorAll(".scroll").forEach((box, place) => (box.scrollLeft = scrolled[place] || 0));
  if (focused >= 0) part.querySelectorAll(FOCUSABLE)[focused]?.focus({ preventScroll: true });
}

async function refresh() {
  const parts = document.querySelectorAll("[data-live][id]");
  if (!parts.length || document.hidden) return;
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (answer.redirected || answer.status === 405) return; // a proxy's login; what came by POST
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of parts) {
    const newer = page.getElementById(part.id);
    if (part.id === "retry" && !newer) return location.reload();
    if (!newer || isBusy(part) || newer.innerHTML === part.innerHTML) continue;
    replace(part, newer);
  }
}

async function turn() {
  try {
    await refresh();
    document.body.classList.remove("stale");
  } catch {
    document.body.classList.add("stale"); // the console has ended, or is starting
  }
  setTimeout(turn, SECONDS * 1000);
}

setTimeout(turn, SECONDS * 1000);

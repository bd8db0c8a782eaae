// The page: conversations, messages, models, and the pane that fills gaps.

import { setUpAccount } from "./account.js";
import { AnswerView, write } from "./answers.js";
import { byId, make } from "./elements.js";
import { fillPane } from "./fill.js";
import { call } from "./server.js";
import { sampling, settings, setUpSettings } from "./settings.js";

const models = (await call("GET", "/v1/models")).data;
const cards = Object.fromEntries(models.map((model) => [model.id, model]));
let conversation = { id: null, turns: [] }; // turns: [{user, answers: {model: {text, speed, problem}}}]
let running = null; // an AbortController while answers come

await setUpAccount(() => open(null));
setUpSettings();
setUpModels();
setUpTabs();
fillPane({ chosenModels, cards, say });
byId("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("say").value;
  if (!text.trim() || running) return;
  byId("say").value = "";
  answer(text);
});
byId("say").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("compose").requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => open(null));
byId("menu").addEventListener("click", () => showSide(byId("menu").getAttribute("aria-expanded") !== "true"));
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
await list();
draw();

function say(text) {
  byId("status").textContent = text;
}

function showSide(isOpen) {
  byId("menu").setAttribute("aria-expanded", String(isOpen));
  document.body.classList.toggle("side-open", isOpen);
}

function setUpModels() {
  byId("model").append(...models.map((model) => make("option", { value: model.id }, model.id)));
  byId("versus").hidden = models.length < 2;
  const showOther = () => {
    byId("other").textContent = models.find((model) => model.id !== byId("model").value)?.id ?? "";
  };
  byId("model").addEventListener("change", showOther);
  showOther();
}

function chosenModels() {
  const first = byId("model").value;
  const others = models.map((model) => model.id).filter((id) => id !== first);
  return byId("both").checked ? [first, ...others] : [first];
}

function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    chosen.focus();
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      if (["ArrowLeft", "ArrowRight"].includes(event.key)) choose(tabs[(i + 1) % tabs.length]);
    });
  });
}

// Everything said before a turn, as one model was told it.
function messagesBefore(turn, model) {
  const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
  for (const one of conversation.turns.slice(0, turn)) {
    const reply = one.answers[model] ?? Object.values(one.answers)[0];
    messages.push({ role: "user", content: one.user }, { role: "assistant", content: reply?.text ?? "" });
  }
  return messages;
}

async function answer(text) {
  const told = conversation; // another one may be opened meanwhile
  const turn = { user: text, answers: {} };
  const place = told.turns.push(turn) - 1;
  const element = turnElement(turn, place);
  const beside = element.querySelector(".answers");
  byId("log").append(element);
  byId("log").classList.remove("empty");
  setRunning(new AbortController());
  const signal = running.signal;
  say("Answering.");
  const chosen = chosenModels();
  await Promise.all(chosen.map(async (model) => {
    const view = new AnswerView(model);
    beside.append(view.element);
    view.element.scrollIntoView({ block: "nearest" });
    const messages = [...messagesBefore(place, model), { role: "user", content: text }];
    const body = { model, messages, ...sampling() };
    turn.answers[model] = await write(view, "/v1/chat/completions", body, signal, cards[model]);
    view.below.lastElementChild?.scrollIntoView({ block: "nearest" });
  }));
  try {
    await save(told); // before anything else can be asked: what is kept last is what was said last
  } finally {
    setRunning(null);
  }
  say("The answer is complete.");
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  byId("log").setAttribute("aria-busy", String(Boolean(controller)));
}

function turnElement(turn, place) {
  const edit = make("button", { type: "button", class: "small" }, "Edit");
  const again = make("button", { type: "button", class: "small" }, "Regenerate");
  edit.addEventListener("click", () => {
    if (running) return;
    byId("say").value = turn.user;
    cutAt(place);
    byId("say").focus();
  });
  again.addEventListener("click", () => {
    if (running) return;
    cutAt(place);
    answer(turn.user);
  });
  const said = make("div", { class: "said" }, make("h3", { class: "hidden" }, "You"), make("div", { class: "text" }, turn.user));
  return make("section", { class: "turn" }, said, make("div", { class: "tools" }, edit, again), make("div", { class: "answers" }));
}

function cutAt(place) {
  conversation.turns.length = place;
  draw();
}

function draw() {
  const log = byId("log");
  log.replaceChildren();
  log.classList.toggle("empty", conversation.turns.length === 0);
  conversation.turns.forEach((turn, place) => {
    const element = turnElement(turn, place);
    for (const [model, kept] of Object.entries(turn.answers)) {
      const view = new AnswerView(model);
      view.add(kept.text);
      view.finish(kept.speed, kept.problem, null);
      element.querySelector(".answers").append(view.element);
    }
    log.append(element);
  });
  log.scrollTop = log.scrollHeight;
}

async function save(told) {
  const body = { title: told.turns[0].user.trim().slice(0, 60), content: { turns: told.turns } };
  try {
    if (told.id) await call("PUT", `/api/conversations/${told.id}`, body);
    else told.id = (await call("POST", "/api/conversations", body)).id;
    byId("problem").textContent = "";
  } catch (error) {
    byId("problem").textContent = `The conversation is not kept: ${error.message}`;
  }
  await list();
}

async function list() {
  const kept = await call("GET", "/api/conversations");
  byId("none").hidden = kept.length > 0;
  byId("conversations").replaceChildren(...kept.map((one) => {
    const choose = make("button", { type: "button", class: "plain" }, one.title || "(empty)");
    if (one.id === conversation.id) choose.setAttribute("aria-current", "true");
    choose.addEventListener("click", () => open(one.id));
    const drop = make("button", { type: "button", class: "icon" }, "×");
    drop.setAttribute("aria-label", `Delete ${one.title}`);
    drop.addEventListener("click", async () => {
      await call("DELETE", `/api/conversations/${one.id}`);
      if (one.id === conversation.id) await open(null);
      else await list();
    });
    return make("li", {}, choose, drop);
  }));
}

async function open(id) {
  running?.abort();
  const kept = id && (await call("GET", `/api/conversations/${id}`));
  conversation = { id, turns: kept ? kept.content.turns : [] };
  showSide(false);
  draw();
  await list();
  byId("say").focus();
}

// The pane that fills the gap between two texts.

import { AnswerView, write } from "./answers.js";
import { byId, make } from "./elements.js";
import { sampling } from "./settings.js";

export function fillPane({ chosenModels, cards, say }) {
  let running = null;

  byId("gap").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    const prompt = byId("before").value, suffix = byId("after").value;
    running = new AbortController();
    toggle(true);
    byId("filled").replaceChildren();
    await Promise.all(chosenModels().map(async (model) => {
      const show = (text) => make("pre", { class: "text", tabIndex: 0 }, prompt, make("mark", {}, text), suffix);
      const view = new AnswerView(model, show);
      byId("filled").append(view.element);
      const body = { model, prompt, suffix, ...sampling() };
      await write(view, "/v1/completions", body, running.signal, cards[model]);
    }));
    running = null;
    toggle(false);
    say("The gap is filled.");
  });
  byId("stop-fill").addEventListener("click", () => running?.abort());

  function toggle(isRunning) {
    byId("do-fill").hidden = isRunning;
    byId("stop-fill").hidden = !isRunning;
  }
}

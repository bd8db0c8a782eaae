// Settings of the next answer, kept in the browser.

import { byId } from "./elements.js";

const KEPT = "dsv3-settings";
const DEFAULTS = {
  system: "", temperature: 0.7, top_p: 1, max_tokens: 128, seed: "", drafts: "", stops: "", experts: true,
};

export const settings = { ...DEFAULTS, ...read() };

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

// What a request says of them.
export function sampling() {
  const asked = {
    temperature: Number(settings.temperature),
    top_p: Number(settings.top_p),
    max_tokens: Number(settings.max_tokens),
    experts: settings.experts,
    stop: settings.stops.split("\n").filter(Boolean),
  };
  for (const name of ["seed", "drafts"]) if (settings[name] !== "") asked[name] = Number(settings[name]);
  return asked;
}

export function setUpSettings() {
  const dialog = byId("settings");
  const fields = Object.keys(DEFAULTS).map(byId);
  byId("open-settings").addEventListener("click", () => {
    for (const field of fields) {
      if (field.type === "checkbox") field.checked = settings[field.id];
      else field.value = settings[field.id];
    }
    dialog.showModal();
  });
  dialog.querySelector("form").addEventListener("submit", () => {
    for (const field of fields) settings[field.id] = field.type === "checkbox" ? field.checked : field.value;
    localStorage.setItem(KEPT, JSON.stringify(settings));
  });
}

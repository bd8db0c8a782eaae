// Elements of the page. Text becomes text nodes only: nothing that a model or a user writes is read as HTML.

export const byId = (id) => document.getElementById(id);

export function make(name, properties = {}, ...children) {
  return filled(document.createElement(name), properties, children);
}

export function makeMath(name, ...children) {
  return filled(document.createElementNS("http://www.w3.org/1998/Math/MathML", name), {}, children);
}

function filled(element, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key === "role" || key === "class") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

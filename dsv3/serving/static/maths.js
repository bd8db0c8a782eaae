// A part of TeX as MathML: scripts, fractions, roots, Greek, common operators, accents, matrices. What is not known is
// shown as it was written.

import { makeMath } from "./elements.js";

const LETTERS = Object.fromEntries(
  `alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ iota ι kappa κ lambda λ mu μ nu ν xi ξ
  pi π rho ρ sigma σ tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π
  Sigma Σ Phi Φ Psi Ψ Omega Ω infty ∞ ell ℓ partial ∂ nabla ∇ emptyset ∅ hbar ℏ`.split(/\s+/).map((w, i, all) => [w, all[i + 1]]).filter((_, i) => i % 2 === 0));
const OPERATORS = Object.fromEntries(
  `times × cdot ⋅ div ÷ pm ± mp ∓ le ≤ leq ≤ ge ≥ geq ≥ ne ≠ neq ≠ approx ≈ equiv ≡ sim ∼ propto ∝ in ∈ notin ∉
  subset ⊂ subseteq ⊆ cup ∪ cap ∩ to → rightarrow → leftarrow ← Rightarrow ⇒ implies ⇒ iff ⇔ mapsto ↦ forall ∀
  exists ∃ neg ¬ land ∧ lor ∨ sum ∑ prod ∏ int ∫ oint ∮ ldots … cdots ⋯ dots … vdots ⋮ mid ∣ parallel ∥ perp ⊥
  langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ circ ∘ star ⋆ ast ∗ oplus ⊕ otimes ⊗ { { } } | ‖`.split(/\s+/).map((w, i, all) => [w, all[i + 1]]).filter((_, i) => i % 2 === 0));
const NAMES = new Set("sin cos tan log ln exp max min lim det gcd arg sup inf deg dim ker mod".split(" "));
const ACCENTS = { hat: "^", bar: "¯", vec: "→", tilde: "~", dot: "˙", overline: "¯" };
const SPACES = { ",": "0.17em", ";": "0.28em", ":": "0.22em", " ": "0.25em", quad: "1em", qquad: "2em", "!": "0em" };
const FONTS = new Set("mathrm mathbf mathit mathbb mathcal operatorname text textbf textit boldsymbol".split(" "));
const DEEPEST = 50;

export function mathOf(tex, isBlock) {
  const tokens = tex.match(/\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\s+|[^]/gu) ?? [];
  const math = makeMath("math", ...new Reader(tokens).row(() => false, 0));
  if (isBlock) math.setAttribute("display", "block");
  return math;
}

class Reader {
  constructor(tokens) {
    this.tokens = tokens;
    this.place = 0;
  }

  peek() {
    while (/^\s+$/.test(this.tokens[this.place] ?? "")) this.place += 1;
    return this.tokens[this.place];
  }

  next() {
    const token = this.peek();
    this.place += 1;
    return token;
  }

  // Everything up to a token that ends the row; that is taken too.
  row(isEnd, depth) {
    const parts = [];
    for (let token = this.peek(); token !== undefined; token = this.peek()) {
      if (isEnd(token)) {
        this.next();
        break;
      }
      parts.push(this.withScripts(depth));
    }
    return parts;
  }

  withScripts(depth) {
    const base = this.atom(depth);
    let below = null, above = null;
    for (let token = this.peek(); token === "_" || token === "^"; token = this.peek()) {
      this.next();
      if (token === "_") below = this.atom(depth);
      else above = this.atom(depth);
    }
    const isWide = ["∑", "∏", "lim", "max", "min"].includes(base.textContent);
    const names = isWide ? ["munder", "mover", "munderover"] : ["msub", "msup", "msubsup"];
    if (below && above) return makeMath(names[2], base, below, above);
    if (below) return makeMath(names[0], base, below);
    return above ? makeMath(names[1], base, above) : base;
  }

  group(depth) {
    if (this.peek() === "{") {
      this.next();
      return makeMath("mrow", ...this.row((token) => token === "}", depth));
    }
    return this.atom(depth);
  }

  // The letters of a group as they stand, spaces too.
  plain() {
    if (this.peek() !== "{") return this.next() ?? "";
    this.next();
    const start = this.place;
    let open = 1;
    while (this.place < this.tokens.length && open > 0) {
      const token = this.tokens[this.place];
      open += token === "{" ? 1 : token === "}" ? -1 : 0;
      this.place += 1;
    }
    return this.tokens.slice(start, this.place - (open ? 0 : 1)).join("");
  }

  atom(depth) {
    const token = this.peek();
    if (token === undefined) return makeMath("mrow");
    if (depth > DEEPEST) return makeMath("mtext", this.next());
    if (token === "{") return this.group(depth + 1);
    this.next();
    if (/^\d/.test(token)) return makeMath("mn", token);
    if (/^\p{L}$/u.test(token)) return makeMath("mi", token);
    return token.length > 1 && token.startsWith("\\") ? this.command(token.slice(1), depth + 1) : makeMath("mo", token);
  }

  command(name, depth) {
    if (Object.hasOwn(LETTERS, name)) return makeMath("mi", LETTERS[name]);
    if (Object.hasOwn(OPERATORS, name)) return makeMath("mo", OPERATORS[name]);
    if (NAMES.has(name)) return makeMath("mi", name);
    if (FONTS.has(name)) return makeMath("mtext", this.plain());
    if (Object.hasOwn(SPACES, name)) {
      const space = makeMath("mspace");
      space.setAttribute("width", SPACES[name]);
      return space;
    }
    if (["frac", "dfrac", "tfrac"].includes(name)) return makeMath("mfrac", this.group(depth), this.group(depth));
    if (name === "binom") {
      const pair = makeMath("mfrac", this.group(depth), this.group(depth));
      pair.setAttribute("linethickness", "0");
      return makeMath("mrow", makeMath("mo", "("), pair, makeMath("mo", ")"));
    }
    if (name === "sqrt") return this.root(depth);
    if (name === "boxed") {
      const box = makeMath("mrow", this.group(depth));
      box.setAttribute("class", "boxed");
      return box;
    }
    if (Object.hasOwn(ACCENTS, name)) {
      const accented = makeMath("mover", this.group(depth), makeMath("mo", ACCENTS[name]));
      accented.setAttribute("accent", "true");
      return accented;
    }
    if (name === "left" || name === "right") {
      const sign = this.next() ?? "";
      return makeMath("mo", sign === "." ? "" : OPERATORS[sign.slice(1)] ?? sign);
    }
    if (name === "begin") return this.table(depth);
    return makeMath("mtext", `\\${name}`);
  }

  root(depth) {
    if (this.peek() !== "[") return makeMath("msqrt", this.group(depth));
    this.next();
    const index = makeMath("mrow", ...this.row((token) => token === "]", depth));
    return makeMath("mroot", this.group(depth), index);
  }

  table(depth) {
    const kind = this.plain();
    const rows = [[]];
    let ended = false, open = true;
    while (open && this.peek() !== undefined) {
      let last = "";
      const isEnd = (token) => ["&", "\\\\", "\\end"].includes(token) && Boolean((last = token));
      rows.at(-1).push(makeMath("mtd", ...this.row(isEnd, depth)));
      if (last === "\\\\") rows.push([]);
      ended = last === "\\end";
      open = last === "&" || last === "\\\\";
    }
    if (ended) this.plain();
    const table = makeMath("mtable", ...rows.filter((row) => row.length).map((row) => makeMath("mtr", ...row)));
    const [before, after] = { pmatrix: "()", bmatrix: "[]", vmatrix: "||", cases: "{ " }[kind] ?? "  ";
    return makeMath("mrow", makeMath("mo", before.trim()), table, makeMath("mo", after.trim()));
  }
}

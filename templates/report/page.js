"use strict";
// The transcript browser. Text from the run is inserted as textContent only, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!data.items.length) return;
  const PAGE = 50;
  const byId = (id) => document.getElementById(id);
  const T = (number) => data.texts[number];
  // Characters that reorder or hide the text after them are shown by their code. (Marks that Hebrew or Arabic need are not.)
  const HIDDEN = /([\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}])/u;
  const code = (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  const plain = (text) => text.split(HIDDEN).map((part, n) => (n % 2 ? code(part) : part)).join("");

  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children);
    return element;
  }
  /** Appends text to an element and replaces each hidden character by a visible mark. */
  function write(element, text) {
    text.split(HIDDEN).forEach((part, n) => {
      if (n % 2) element.append(make("span", "control", code(part)));
      else if (part) element.append(part);
    });
    return element;
  }
  function block(text, label) {
    const element = write(make("div", "text"), text);
    element.dir = "auto";
    return scrolled(element, text, label);
  }
  /** Wraps long content in a scrolling box that the keyboard can reach. */
  function scrolled(element, text, label) {
    if (text.length > 3000) {
      element.classList.add("long");
      element.tabIndex = 0;
      element.setAttribute("role", "region");
      element.setAttribute("aria-label", label);
    }
    return element;
  }
  const badge = (text) => make("span", "badge", plain(text));
  const label = (...parts) => {
    const element = make("p", "label");
    parts.filter(Boolean).forEach((part, place) => element.append(place ? " " : "", part));
    return element;
  };

  // --- filters

  const FIELDS = {
    set: (item) => [item.set],
    kind: (item) => (item.kind ? [item.kind] : []),
    category: (item) => (item.category ? [item.category] : []),
    principle: (item) => [...item.rounds, ...item.pairs].map((one) => one.principle).filter(Boolean),
    outcome: (item) => item.outcomes,
  };
  const key = (item) => `${item.set}:${item.id}`;
  const items = data.items.map((item) => ({ ...item, key: key(item) }));
  const place = new Map(items.map((item, number) => [item.key, number]));
  for (const [name, read] of Object.entries(FIELDS)) {
    const values = new Map();
    for (const item of items) for (const value of new Set(read(item))) values.set(value, (values.get(value) || 0) + 1);
    const select = byId(`f-${name}`);
    for (const [value, count] of [...values].sort((a, b) => (a[0] < b[0] ? -1 : 1))) {
      const option = make("option", "", `${plain(value)} (${count})`);
      option.value = value;
      select.append(option);
    }
    if (!values.size) select.parentElement.hidden = true;
  }
  const haystacks = new Map();
  function haystack(item) {
    if (!haystacks.has(item.key)) {
      const numbers = [...item.prompt.map(([, text]) => text), ...item.responses.map(([, text]) => text)];
      for (const one of item.rounds) numbers.push(one.critique, one.revision, one.refused);
      for (const pair of item.pairs) numbers.push(pair.a, pair.b);
      const texts = [...new Set(numbers)].filter((number) => number !== null).map(T);
      haystacks.set(item.key, [item.id, ...texts].join("\n").toLowerCase());
    }
    return haystacks.get(item.key);
  }
  let found = items;
  let listed = PAGE;
  function filter() {
    const words = byId("q").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = Object.keys(FIELDS).map((name) => [name, byId(`f-${name}`).value]).filter(([, value]) => value);
    found = items.filter((item) =>
      wanted.every(([name, value]) => FIELDS[name](item).includes(value)) &&
      words.every((word) => haystack(item).includes(word)));
    listed = PAGE;
    byId("list").replaceChildren();
    list();
    byId("count").textContent = `${found.length.toLocaleString("en")} of ${items.length.toLocaleString("en")} transcripts`;
    walk();
  }
  function list() {
    const box = byId("list");
    for (const item of found.slice(box.children.length, listed)) {
      const link = make("a", "");
      link.href = `#t=${encodeURIComponent(item.key)}`;
      const text = T(item.prompt[item.prompt.length - 1][1]);
      write(link, text.length > 110 ? `${text.slice(0, 110)}…` : text);
      link.dir = "auto";
      const meta = [item.set, item.kind, item.category, item.outcomes[0]].filter(Boolean).join(" · ");
      link.append(make("span", "meta", plain(meta)));
      if (item === current) link.setAttribute("aria-current", "true");
      box.append(make("li", "", link));
    }
    byId("more").hidden = found.length <= listed;
    byId("more").textContent = `Show ${Math.min(PAGE, found.length - listed)} more`;
  }

  // --- one transcript

  let current = null;
  function show(item) {
    current = item;
    for (const link of byId("list").querySelectorAll("a")) {
      if (link.hash === `#t=${encodeURIComponent(item.key)}`) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    const parts = [make("h3", "", plain(item.id)), label(...[item.set, item.kind, item.category].filter(Boolean).map(badge)), walkers()];
    const speakers = { user: "Prompt", assistant: "Earlier answer", system: "System" };
    for (const [role, text] of item.prompt) parts.push(label(speakers[role] || plain(role)), block(T(text), "prompt"));
    for (const [name, text, kind] of item.responses) {
      parts.push(make("h4", "", name === "response" ? "Response" : `Response ${plain(name)}`, " ", ...(kind ? [badge(kind)] : [])), block(T(text), "response"));
    }
    item.rounds.forEach((one, number) => parts.push(...round(one, number + 1)));
    if (item.pairs.length) parts.push(make("h4", "", "Compared by the judge"));
    for (const pair of item.pairs) parts.push(...comparison(pair));
    byId("detail").replaceChildren(...parts);
    walk();
  }
  const [REQUEST, QUESTION] = [0, 1];
  function principle(id, which) {
    const text = Object.hasOwn(data.principles, id) && data.principles[id][which];
    return label(`Principle ${plain(id)}`, text && `– ${plain(text)}`);
  }
  function round(one, number) {
    const badges = [one.class, one.skipped && `skipped: ${one.skipped}`, ...one.flags.map((flag) => `flag: ${flag}`)];
    const parts = [make("h4", "", `Round ${number}`, " ", ...badges.filter(Boolean).map(badge))];
    if (one.principle === null) return [...parts, label("No principle speaks to the prompt: the text was left as it was.")];
    parts.push(principle(one.principle, REQUEST), label("Critique"), block(T(one.critique), "critique"));
    if (one.skipped) return [...parts, label("The critique finds no fault: the text was left as it was.")];
    if (one.refused !== null) return [...parts, label("The gate refused this revision, and the text before it stays"), block(T(one.refused), "revision")];
    if (one.revision === null) return parts;
    if (one.changes && !one.changes.length) return [...parts, label("Revision: the text was left as it was.")];
    parts.push(label(one.changes ? "Revision, with what was removed and added" : "Revision (too long to mark what changed)"));
    parts.push(one.changes ? marked(T(one.before), T(one.revision), one.changes) : block(T(one.revision), "revision"));
    return parts;
  }
  /** Shows the revision with its changes: [kept, deleted, inserted] in code points, from the start. */
  function marked(before, after, changes) {
    const [old, now] = [Array.from(before), Array.from(after)];
    const element = make("div", "text");
    let [i, j] = [0, 0];
    const take = (count) => { const text = now.slice(j, j + count).join(""); j += count; return text; };
    for (const [kept, deleted, inserted] of changes) {
      write(element, take(kept));
      i += kept;
      if (deleted) element.append(write(make("del", ""), old.slice(i, i + deleted).join("")));
      i += deleted;
      if (inserted) element.append(write(make("ins", ""), take(inserted)));
    }
    write(element, now.slice(j).join(""));
    element.dir = "auto";
    return scrolled(element, before + after, "revision");
  }
  function comparison(pair) {
    const p = pair.p;
    const verdict = p === null || p === 0.5 ? "undecided"
      : `prefers ${p > 0.5 ? "A" : "B"} with probability ${Math.max(p, 1 - p).toFixed(3)}`;
    const sides = ["a", "b"].map((side) => {
      const won = p !== null && p !== 0.5 && (side === "a") === (p > 0.5);
      return make("div", "", label(`Response ${side.toUpperCase()}`, won && badge("preferred")), block(T(pair[side]), `response ${side}`));
    });
    return [label(verdict[0].toUpperCase() + verdict.slice(1), pair.same_position && badge("same place in both orders")),
      ...(pair.principle ? [principle(pair.principle, QUESTION)] : []), make("div", "pair", ...sides)];
  }
  function walkers() {
    const box = make("div", "walk");
    for (const [text, step] of [["Previous", -1], ["Next", 1]]) {
      const button = make("button", "", text);
      button.type = "button";
      button.dataset.step = step;
      button.addEventListener("click", () => {
        const next = found[found.indexOf(current) + step];
        if (next) location.hash = `t=${encodeURIComponent(next.key)}`;
      });
      box.append(button);
    }
    return box;
  }
  function walk() {
    const here = found.indexOf(current);
    for (const button of document.querySelectorAll(".walk button")) {
      button.disabled = here < 0 || !found[here + Number(button.dataset.step)];
    }
  }

  // --- links: #t=set:id opens a transcript, #p=principle filters by it

  function follow(arrived) {
    const [, what, raw] = /^#([tp])=(.*)$/s.exec(location.hash) || [];
    if (!what) return;
    let value = raw;
    try { value = decodeURIComponent(raw); } catch { /* a malformed link is used unchanged */ }
    if (what === "p") {
      byId("controls").reset();
      byId("f-principle").value = value;
      filter();
      byId("transcripts").scrollIntoView();
      byId("f-principle").focus({ preventScroll: true });
      return;
    }
    const item = items[place.get(value)];
    if (!item) {
      byId("count").textContent = `The transcript ${plain(value)} is not in this page; look for it in the run's files.`;
      byId("transcripts").scrollIntoView();
      return;
    }
    show(item);
    byId("detail").focus({ preventScroll: true });
    byId("detail").scrollIntoView({ block: arrived ? "start" : "nearest" });
    if (byId("detail").getBoundingClientRect().top < 0) byId("detail").scrollIntoView({ block: "start" });
  }

  byId("browser").hidden = false;
  filter();
  show(items[0]);
  let timer = 0;
  byId("q").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 120); });
  for (const name of Object.keys(FIELDS)) byId(`f-${name}`).addEventListener("change", filter);
  byId("controls").addEventListener("submit", (event) => { event.preventDefault(); filter(); });
  byId("controls").addEventListener("reset", () => setTimeout(filter));
  byId("more").addEventListener("click", () => {
    const first = byId("list").children.length;
    listed += PAGE;
    list();
    byId("list").children[first].firstChild.focus();
  });
  window.addEventListener("hashchange", () => follow(false));
  let opened = [];
  window.addEventListener("beforeprint", () => { opened = [...document.querySelectorAll("details:not([open])")]; opened.forEach((one) => { one.open = true; }); });
  window.addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
  follow(true);
})();

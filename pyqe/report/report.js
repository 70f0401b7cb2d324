"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const form = byId("controls");
  const card = byId("card");
  const slider = byId("threshold");
  if (!form) return; // no token has a score

  // A block is one text: its token spans and, for each, the range of tokens that lie on it.
  const blocks = [...document.querySelectorAll(".tokens")].map((element, index) => {
    const entry = data.texts[index];
    const spans = [...element.querySelectorAll(":scope > span")];
    let first = 0;
    const ranges = spans.map((_, number) => {
      const range = [first, first + (entry.n ? entry.n[number] : 1)];
      first = range[1];
      return range;
    });
    return { entry, spans, ranges, wrong: new Set(entry.w || []) };
  });
  const signals = data.signals;
  const choices = signals.filter((signal) => signal.key !== "max");
  const thresholds = Object.fromEntries(choices.map((signal) => [signal.key, signal.low ? signal.max : 0]));
  let current = choices[0];
  let shown = null; // the token that the card is about

  const valuesOf = (entry, signal, [first, last]) =>
    entry[signal.key] ? entry[signal.key].slice(first, last) : new Array(last - first).fill(null);
  const isBeyond = (value) =>
    value !== null && (current.low ? value > thresholds[current.key] : value < thresholds[current.key]);
  const format = (value) => {
    if (value === null || value === undefined) return "–";
    return value > 0 && value < 0.001 ? value.toExponential(1) : value.toFixed(3);
  };
  const visible = (token) => {
    const spaced = token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +| +$/g, (run) => "␣".repeat(run.length));
    return spaced.replace(/[\0-\x1f]/g, (character) => String.fromCharCode(0x2400 + character.charCodeAt(0)));
  };

  function colourClass(values) {
    const known = values.filter((value) => value !== null);
    if (!known.length) return "qn";
    const share = (current.low ? Math.max(...known) : Math.min(...known)) / current.max;
    const good = current.low ? 1 - share : share;
    const colour = Math.min(data.colours - 1, Math.max(0, Math.floor(good * data.colours)));
    return `q${colour}${known.length < values.length ? " h" : ""}`;
  }

  function paint() {
    for (const { entry, spans, ranges } of blocks) {
      spans.forEach((span, number) => {
        const kept = [..."zn"].filter((name) => span.classList.contains(name));
        span.className = [colourClass(valuesOf(entry, current, ranges[number])), ...kept].join(" ");
      });
    }
    byId("scale-low").textContent = current.low ? `${current.max.toFixed(1)} nats` : "0";
    byId("scale-high").textContent = current.low ? "0" : "1";
    byId("scale-name").textContent = current.label;
    byId("threshold-label").textContent = `Mark tokens ${current.low ? "above" : "below"}`;
    slider.max = current.max;
    slider.value = thresholds[current.key];
    mark();
  }

  // Marks the spans beyond the threshold and counts tokens.
  function mark() {
    let marked = 0, scored = 0, wrong = 0, found = 0;
    for (const block of blocks) {
      block.spans.forEach((span, number) => {
        const values = valuesOf(block.entry, current, block.ranges[number]).filter((value) => value !== null);
        const beyond = values.filter(isBeyond).length;
        span.classList.toggle("m", beyond > 0);
        scored += values.length;
        marked += beyond;
        if (block.wrong.has(number)) {
          wrong += values.length;
          found += beyond;
        }
      });
    }
    byId("threshold-value").textContent = thresholds[current.key].toFixed(2);
    const share = scored ? (100 * marked) / scored : 0;
    let line = `${marked.toLocaleString("en")} of ${scored.toLocaleString("en")} tokens (${share.toFixed(1)} %)`;
    if (wrong) line += `, among them ${found} of ${wrong} in known errors`;
    byId("marked").textContent = line;
  }

  function element(name, className, text) {
    const made = document.createElement(name);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function cardOfToken(entry, index) {
    const part = element("div", "card-token");
    const head = element("div", "card-head");
    const id = entry.i && entry.i[index] !== null ? `id ${entry.i[index]}, ` : "";
    head.append(element("bdi", "", visible(entry.t[index])), element("span", "", `${id}${index + 1} of ${entry.t.length}`));
    part.append(head);
    for (const signal of signals) {
      const value = entry[signal.key] ? entry[signal.key][index] : null;
      const row = element("div", signal === current ? "card-row current" : "card-row");
      const track = element("span", value === null ? "track qn" : "track");
      const bar = element("i", "");
      bar.style.width = `${Math.min(100, Math.max(0, (100 * (value || 0)) / signal.max))}%`;
      track.append(bar);
      row.append(element("span", "", signal.label), track, element("span", "", format(value) + (signal.low && value !== null ? " nats" : "")));
      part.append(row);
    }
    return part;
  }

  function showCard(span) {
    const block = blocks.find((one) => one.spans[0].parentNode === span.parentNode);
    const [first, last] = block.ranges[block.spans.indexOf(span)];
    shown = span;
    span.removeAttribute("title"); // the card replaces it
    card.replaceChildren();
    for (let index = first; index < Math.min(last, first + 4); index++) card.append(cardOfToken(block.entry, index));
    if (last > first + 4) card.append(element("div", "note", `and ${last - first - 4} more tokens on the same characters`));
    span.setAttribute("aria-describedby", "card");
    card.hidden = false;
    placeCard();
  }

  // Below its token where there is room, else above.
  function placeCard() {
    if (card.hidden) return;
    const lines = [...shown.getClientRects()].sort((one, other) => other.width - one.width);
    const place = lines[0] || shown.getBoundingClientRect();
    const below = place.bottom + 8 + card.offsetHeight <= innerHeight;
    const left = Math.min(place.left, document.documentElement.clientWidth - card.offsetWidth - 8);
    card.style.left = `${Math.max(8, left)}px`;
    card.style.top = `${below ? place.bottom + 8 : Math.max(8, place.top - 8 - card.offsetHeight)}px`;
  }

  function hideCard() {
    card.hidden = true;
  }

  const tokenOf = (target) => (target instanceof Element ? target.closest(".tokens > span") : null);

  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    if (event.target.name !== "signal") return;
    current = choices.find((signal) => signal.key === event.target.value);
    paint();
  });
  slider.addEventListener("input", () => {
    thresholds[current.key] = Number(slider.value);
    mark();
  });

  document.addEventListener("pointerover", (event) => {
    const span = tokenOf(event.target);
    if (span) showCard(span);
    else hideCard();
  });
  document.addEventListener("focusin", (event) => {
    const span = tokenOf(event.target);
    if (span) showCard(span);
  });
  document.addEventListener("focusout", hideCard);
  document.addEventListener("scroll", placeCard, { passive: true });

  // One stop of the Tab key for each text; the arrow keys walk through its tokens.
  for (const { spans } of blocks) if (spans.length) spans[0].tabIndex = 0;
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideCard();
    const span = tokenOf(event.target);
    if (!span) return;
    const { spans } = blocks.find((block) => block.spans[0] && block.spans[0].parentNode === span.parentNode);
    const at = spans.indexOf(span);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined || !spans[next]) return;
    event.preventDefault();
    span.tabIndex = -1;
    spans[next].tabIndex = 0;
    spans[next].focus();
  });

  // A new hash flashes its token by :target; the same one again needs its animation restarted.
  byId("places")?.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link || link.hash !== location.hash) return;
    const span = byId(link.hash.slice(1));
    span.style.animation = "none";
    void span.offsetWidth; // lays out without the animation
    span.style.animation = "";
  });
})();

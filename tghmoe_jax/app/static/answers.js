// One answer as it is shown: everything that its reader must know beside it.

export function element(name, text, properties = {}) {
  const found = Object.assign(document.createElement(name), properties);
  if (text) found.textContent = text;
  return found;
}

function bars(shares) {
  const list = element("ul", "");
  for (const [name, value] of Object.entries(shares).sort((a, b) => b[1] - a[1])) {
    const item = element("li", "");
    const bar = element("progress", "", { max: 1, value });
    bar.setAttribute("aria-label", `${name}: ${value.toFixed(3)}`);
    item.append(bar, ` ${value.toFixed(3)} ${name}`);
    list.append(item);
  }
  return list;
}

function place(part) {
  const spans = ["slices", "rows", "columns"].map((name) => `${name} ${part[name][0]} to ${part[name][1]}`).join(", ");
  const share = part.share === null ? "" : `, ${Math.round(100 * part.share)} % of the fall with all hidden`;
  return `${spans}: hiding it takes ${part.fall.toFixed(2)} nats${share}`;
}

// overlayOf(answer, overlay, edges) shows an overlay and moves the crosshair into a box.
export function answerCard(answer, facts, overlayOf) {
  const card = element("article", "");
  card.setAttribute("aria-label", `Answer ${answer.number}`);
  const asked = answer.report ? "A report" : answer.question;
  card.append(element("h3", `${answer.number}. ${asked}`));
  if (answer.choices.length) card.append(element("p", `Choices: ${answer.choices.join(" | ")}`, { className: "note" }));
  card.append(element("p", answer.refusal || answer.text || "(no text)", { className: "text" }));
  const list = element("dl", "");
  const row = (name, content) => {
    const value = element("dd", typeof content === "string" ? content : "");
    if (typeof content !== "string") value.append(content);
    list.append(element("dt", name), value);
  };
  if (answer.sure) row("Confidence", answer.sure);
  if (answer.option_likelihoods) {
    row("Options", bars(answer.option_likelihoods));
    row("", `(${facts.captions.likelihoods})`);
  }
  row("Answered by", `the experts of ${answer.task}`);
  if (answer.task_probabilities) row("Router", bars(answer.task_probabilities));
  row("Without the scan", answer.blind_text || "(no text)");
  if (answer.blind_text === answer.text && answer.text) row("", "the same as with it: the scan need not matter");
  if (answer.parts) {
    const regions = element("ul", "");
    answer.parts.regions.slice(0, 3).forEach((part, i) => {
      const item = element("li", `${place(part)} `);
      const button = element("button", i ? "Go there" : "Go to the strongest region", { type: "button" });
      button.onclick = () => overlayOf(answer, "regions", part.edges);
      item.append(button);
      regions.append(item);
    });
    row("Rests on", regions);
  }
  if (answer.experts) {
    const button = element("button", "Show the experts", { type: "button" });
    button.onclick = () => overlayOf(answer, "layer0");
    row("Experts", button);
  }
  row("Checkpoint", `${answer.checkpoint.name} ${answer.checkpoint.digest}, ${answer.seconds.toFixed(1)} s`);
  card.append(list);
  if (answer.warnings.length) {
    const warnings = element("ul", "", { className: "warn" });
    answer.warnings.forEach((text) => warnings.append(element("li", text)));
    card.append(warnings);
  }
  card.append(element("p", answer.disclaimer, { className: "note" }));
  return card;
}

// Formulas, the diagram, and the page that draws. All of it is served from here.
const here = new URL(".", document.currentScript.src);

for (const formula of document.querySelectorAll(".arithmatex")) {
  const text = formula.textContent.trim();
  const displayMode = formula.tagName === "DIV";
  katex.render(text.slice(2, -2), formula, { displayMode, throwOnError: false });
}

// Mermaid is large, so only a page with a diagram loads it.
const diagrams = [...document.querySelectorAll("pre.diagram")].map((pre) => {
  const div = document.createElement("div");
  div.className = "diagram";
  pre.replaceWith(div);
  return { div, text: pre.textContent };
});

async function drawDiagrams() {
  const dark = document.body.dataset.mdColorScheme === "slate";
  mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "neutral" });
  for (const [number, { div, text }] of diagrams.entries()) {
    div.innerHTML = (await mermaid.render(`diagram-${number}`, text)).svg;
  }
}

if (diagrams.length) {
  const script = document.createElement("script");
  script.src = new URL("vendor/mermaid/mermaid.tiny.js", here);
  script.onload = () => {
    drawDiagrams();
    new MutationObserver(drawDiagrams).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  };
  document.head.append(script);
}

// The network is a download of some megabytes: it waits for a click.
for (const place of document.querySelectorAll(".draw-here")) {
  place.querySelector("a.md-button").addEventListener("click", (event) => {
    event.preventDefault();
    const frame = document.createElement("iframe");
    frame.src = place.dataset.page;
    frame.title = "Draw cats in your browser";
    frame.addEventListener("load", () => {
      const page = frame.contentDocument.body;
      new ResizeObserver(() => { frame.style.height = `${page.scrollHeight + 4}px`; }).observe(page);
    });
    place.replaceChildren(frame);
  });
}

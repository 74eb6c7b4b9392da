"use strict";

// Colours are filled in when a figure is drawn, from the theme that is shown.
const root = document.documentElement;
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const filledIn = (text) => {
  const style = getComputedStyle(root);
  return JSON.parse(text.replace(/var\(--([a-z]+)\)/g, (_, name) => style.getPropertyValue("--" + name).trim()));
};

// Fits a figure to its reader. On a narrow screen the colour bar goes below the map, so that the map keeps its width.
const fitted = (figure, width) => {
  if (matchMedia("(pointer: fine)").matches && figure.data[0].type !== "heatmap") {
    figure.layout.dragmode = "zoom";  // a finger scrolls the page, a mouse may look closer
    for (const name of Object.keys(figure.layout)) if (/^[xy]axis/.test(name)) figure.layout[name].fixedrange = false;
  }
  if (width >= 560) return figure;
  for (const trace of figure.data) {
    if (trace.type !== "heatmap" || !trace.colorbar) continue;
    const title = { ...trace.colorbar.title, side: "bottom" };
    trace.colorbar = { ...trace.colorbar, orientation: "h", y: -0.01, yanchor: "top", title };
    figure.layout.margin.b = 80;
    figure.layout.height += 90;  // for the bar, and for names that stand aslant
  }
  figure.layout.margin.l = 44;
  figure.layout.margin.r = 8;
  return figure;
};

const draw = (place) => {
  loadPlotly();
  const text = place.querySelector("script").textContent;
  const figure = fitted(filledIn(text), place.clientWidth);
  const target = place.querySelector(".drawn") || place.appendChild(Object.assign(document.createElement("div"), { className: "drawn" }));
  place.dataset.drawn = isDark() ? "dark" : "light";
  return Plotly.react(target, figure.data, figure.layout, { responsive: true, displayModeBar: false });
};

// Compiling plotly takes a second: the page is there to read before that.
const loadPlotly = () => {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
};

const places = [...document.querySelectorAll(".plot")];
const drawMissing = () => places.filter((place) => !place.dataset.drawn).forEach(draw);

// Figures are drawn when they come near, so that a long page opens at once.
const watcher = new IntersectionObserver(
  (entries) => entries.forEach((entry) => {
    if (!entry.isIntersecting) return;
    watcher.unobserve(entry.target);
    if (!entry.target.dataset.drawn) draw(entry.target);
  }),
  { rootMargin: "600px" },
);
addEventListener("load", () => setTimeout(() => places.forEach((place) => watcher.observe(place)), 50));
addEventListener("beforeprint", drawMissing);

const button = document.getElementById("theme");
const name = () => { button.querySelector("span").textContent = isDark() ? "Light" : "Dark"; };
const redraw = () => { name(); places.filter((place) => place.dataset.drawn).forEach(draw); };
button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; redraw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
name();

for (const copy of document.querySelectorAll("[data-copy]")) {
  copy.addEventListener("click", async () => {
    const text = copy.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(text.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);  // no clipboard for a file: the text is selected to be copied by hand
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  });
}

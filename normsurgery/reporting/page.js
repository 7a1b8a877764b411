"use strict";
// Says what the mark nearest to the pointer is; without it the marks' own titles do.
(() => {
  const plot = document.getElementById("error-plot");
  const told = document.getElementById("told");
  const cursor = document.getElementById("cursor");
  const marks = plot ? [...plot.querySelectorAll(".mark")] : [];
  const words = marks.map((mark) => {
    const title = mark.querySelector("title");
    const text = title.textContent;
    title.remove();
    mark.setAttribute("aria-label", text);
    return text;
  });
  const places = marks.map((mark) => [Number(mark.dataset.x), Number(mark.dataset.y)]);
  let shown = -1;

  function show(index) {
    if (shown >= 0) marks[shown].classList.remove("near");
    shown = index;
    const visible = index >= 0 ? "visible" : "hidden";
    told.style.visibility = visible;
    cursor.style.visibility = visible;
    if (index < 0) return;
    marks[index].classList.add("near");
    told.textContent = words[index];
    const [x, y] = places[index];
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const box = plot.getBoundingClientRect();
    const unit = box.width / plot.viewBox.baseVal.width;
    const left = Math.min(x * unit + 14, box.width - told.offsetWidth);
    const below = y * unit + 16;
    told.style.left = `${Math.max(left, 0)}px`;
    told.style.top = `${below}px`;
  }

  function nearest(event) {
    const box = plot.getBoundingClientRect();
    const unit = box.width / plot.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / unit;
    const y = (event.clientY - box.top) / unit;
    let best = -1;
    let least = Infinity;
    places.forEach(([px, py], index) => {
      // Along the axis the pointer is exact; upwards a reader may be far off.
      const distance = (px - x) ** 2 + 0.05 * (py - y) ** 2;
      if (distance < least) [best, least] = [index, distance];
    });
    return best;
  }

  function step(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key === "Escape") return show(-1);
    if (!(event.key in steps)) return undefined;
    event.preventDefault();
    const count = marks.length;
    return show((shown + steps[event.key] + count) % count);
  }

  if (marks.length) {
    plot.addEventListener("pointermove", (event) => show(nearest(event)));
    plot.addEventListener("pointerleave", () => show(-1));
    plot.addEventListener("keydown", step);
    plot.addEventListener("blur", () => show(-1));
  }
  document.documentElement.dataset.ready = String(marks.length);
})();

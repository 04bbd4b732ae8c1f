"use strict";
(() => {
  const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
  const root = document.documentElement, tip = document.getElementById("tip");
  root.classList.add("js");

  // Charts: the points are read from the paths, in the units that their plot names.
  const known = new WeakMap();
  const chart = (plot) => {
    if (known.has(plot)) return known.get(plot);
    const [start, unit, width] = plot.dataset.x.split(" ").map(Number);
    const [low, high, scale] = plot.dataset.y.split(" ");
    const value = (y) => {
      const at = 1 - y / 100000;
      return scale === "log" ? Math.exp(Math.log(low) + at * Math.log(high / low)) : +low + at * (high - low);
    };
    const lines = all("path[data-n]", plot).map((path) => {
      const xs = [], ys = [];
      let x = 0, y = 0;
      for (const [, kind, first, second] of path.getAttribute("d").matchAll(/([Ml])(-?\d+),(-?\d+)/g)) {
        x = kind === "M" ? +first : x + +first;
        y = kind === "M" ? +second : y + +second;
        xs.push(x);
        ys.push(value(y));
      }
      return { path, xs, ys };
    });
    const found = { start, unit, width, lines, percent: scale === "percent", at: null };
    known.set(plot, found);
    return found;
  };
  const visible = (line) => line.path.style.display !== "none" && line.xs.length > 0;
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const written = (number, percent) => {
    if (percent) return `${(100 * number).toFixed(1)}%`;
    const size = Math.abs(number);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return number.toExponential(2);
    return number.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const hide = (plot) => {
    tip.hidden = true;
    if (plot) all(".cursor", plot).forEach((cursor) => cursor.remove());
  };
  const show = (plot, x) => {
    const here = chart(plot), lines = here.lines.filter(visible);
    hide(plot);
    if (!lines.length) return;
    const near = lines.map((line) => line.xs[nearest(line.xs, x)]);
    const at = near.reduce((best, one) => (Math.abs(one - x) < Math.abs(best - x) ? one : best));
    here.at = at;
    const cursor = document.createElement("i");
    cursor.className = "cursor";
    cursor.style.left = `${(100 * at) / here.width}%`;
    plot.append(cursor);
    const title = document.createElement("div");
    title.textContent = `step ${(here.start + at * here.unit).toLocaleString("en", { maximumFractionDigits: 0 })}`;
    const rows = [title];
    for (const line of lines) {
      const i = nearest(line.xs, at);
      if (Math.abs(line.xs[i] - at) > 0.01 * here.width) continue;
      const row = document.createElement("div"), key = document.createElement("span"), name = document.createElement("bdi");
      const number = document.createElement("b");
      key.className = `key ${Array.from(line.path.classList).find((one) => /^c\d+$/.test(one))}`;
      name.textContent = line.path.dataset.n;
      number.textContent = written(line.ys[i], here.percent);
      row.append(key, name, number);
      rows.push(row);
    }
    tip.replaceChildren(...rows);
    tip.hidden = false;
    const box = plot.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = box.left + (box.width * at) / here.width;
    const beside = left + 14 + size.width < root.clientWidth - 6 ? left + 14 : left - 14 - size.width;
    tip.style.left = `${Math.max(6, Math.min(beside, root.clientWidth - size.width - 6))}px`;
    tip.style.top = `${Math.max(6, Math.min(box.top + 8, root.clientHeight - size.height - 6))}px`;
  };
  for (const plot of all(".plot")) {
    const follow = (event) => {
      const box = plot.getBoundingClientRect();
      show(plot, ((event.clientX - box.left) / box.width) * chart(plot).width);
    };
    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", () => hide(plot));
    plot.addEventListener("blur", () => hide(plot));
    plot.addEventListener("keydown", (event) => {
      const here = chart(plot);
      const places = [...new Set(here.lines.filter(visible).flatMap((line) => line.xs))].sort((a, b) => a - b);
      const i = here.at === null ? places.length - 1 : nearest(places, here.at);
      const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: places.length - 1 }[event.key];
      if (event.key === "Escape") hide(plot);
      if (to === undefined || !places.length) return;
      event.preventDefault();
      show(plot, places[Math.max(0, Math.min(to, places.length - 1))]);
    });
  }
  for (const box of all("input[data-run]")) {
    const apply = () => {
      for (const part of all(`.plot .c${box.dataset.run}, .sum > .c${box.dataset.run}`)) {
        part.style.display = box.checked ? "" : "none";
      }
    };
    box.addEventListener("change", apply);
    apply();
  }

  // Previews: each run shows the last one at or before the step.
  const controls = document.querySelector(".controls");
  if (controls) {
    const slider = controls.querySelector("input[type=range]"), output = controls.querySelector("output");
    const steps = slider.dataset.steps.split(" ").map(Number);
    const choose = () => {
      const rate = controls.querySelector("input[name=average]:checked").value, step = steps[slider.value];
      output.textContent = step.toLocaleString("en");
      slider.setAttribute("aria-valuetext", `step ${step}`);
      for (const stack of all(".stack")) {
        const there = all(".preview", stack).filter((one) => one.dataset.rate === rate);
        const before = there.filter((one) => +one.dataset.step <= step);
        const chosen = before.length ? before[before.length - 1] : there[0];
        for (const one of all(".preview", stack)) one.classList.toggle("on", one === chosen);
        stack.querySelector(".none").hidden = there.length > 0;
      }
    };
    controls.hidden = false;
    controls.addEventListener("input", choose);
    choose();
  }

  // Samples: a click enlarges one, the arrow keys go to its neighbours.
  const zoom = document.getElementById("zoom");
  let button = null;
  const enlarge = (one) => {
    if (!one) return;
    button = one;
    const image = zoom.querySelector("img"), small = one.querySelector("img");
    image.src = small.src;
    image.alt = small.alt;
    zoom.querySelector("p").textContent = small.alt;
    if (!zoom.open) zoom.showModal();
  };
  const go = (by) => enlarge(by > 0 ? button.nextElementSibling : button.previousElementSibling);
  for (const one of all(".grid button")) one.addEventListener("click", () => enlarge(one));
  zoom.addEventListener("click", (event) => {
    const by = event.target.closest("button") ? +event.target.closest("button").value : 0;
    if (by) go(by);
    else if (!event.target.closest("p")) zoom.close();
  });
  zoom.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") go(1);
    if (event.key === "ArrowLeft") go(-1);
  });
  zoom.addEventListener("close", () => button && button.focus());

  // Paper has no folds.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    folded.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((one) => { one.open = false; }));
})();

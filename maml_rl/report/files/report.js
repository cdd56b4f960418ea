// The page's two movable parts: charts that are read by pointer or arrow keys, and players whose
// films go together. Text is only ever set as text.
"use strict";

const READINGS = JSON.parse(document.getElementById("readings").textContent);

function chart(plot) {
  const { x, y, series } = READINGS[plot.dataset.chart];
  const tip = plot.querySelector(".tip");
  const points = series.flatMap((one, row) => one.points.map((point, column) => ({ one, row, column, point })));
  let at = null;

  // Of the two sizes that are drawn the one that is seen.
  const picture = () => [...plot.querySelectorAll("svg")].find((svg) => svg.getClientRects().length);

  // From 0 at the axis's lower end to 1 at its upper.
  function share(axis, value) {
    if (!axis.log) return (value - axis.low) / (axis.high - axis.low);
    return value > 0 ? Math.log(value / axis.low) / Math.log(axis.high / axis.low) : 0;
  }

  function place(svg, { one, point }) {
    const [left, top, right, bottom] = svg.dataset.box.split(" ").map(Number);
    const up = Math.min(1, Math.max(0, share(y, point[1])));
    return [
      left + share(x, point[0]) * (right - left) + one.aside,
      bottom - up * (bottom - top),
    ];
  }

  function value(axis, number) {
    return number.toFixed(axis.digits) + (axis.unit ? ` ${axis.unit}` : "");
  }

  function words({ one, point: [across, up, low, high, label] }) {
    const lines = [one.name, label || `${x.name}: ${value(x, across)}`, `${y.name}: ${value(y, up)}`];
    if (low != null) lines.push(`95 % interval: ${low.toFixed(y.digits)} to ${value(y, high)}`);
    return lines.join("\n");
  }

  function show(found) {
    at = found;
    const svg = picture();
    const box = svg.getBoundingClientRect(), outer = plot.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const [across, down] = place(svg, found);
    const ring = svg.querySelector(".ring");
    ring.setAttribute("cx", across);
    ring.setAttribute("cy", down);
    ring.classList.add("on");
    const text = words(found);
    if (tip.textContent !== text) tip.textContent = text;
    const px = box.left - outer.left + across * scale, py = box.top - outer.top + down * scale;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = px + 14 + width > outer.width ? px - 14 - width : px + 14;
    tip.style.left = `${Math.max(0, Math.min(left, outer.width - width))}px`;
    tip.style.top = `${py - 12 - height < 0 ? py + 14 : py - 12 - height}px`;
  }

  function hide() {
    at = null;
    tip.textContent = "";
    plot.querySelectorAll(".ring").forEach((ring) => ring.classList.remove("on"));
  }

  function nearest(event) {
    const svg = picture();
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    let best = null, least = Infinity;
    for (const found of points) {
      const [across, down] = place(svg, found);
      const far = Math.hypot(box.left + across * scale - event.clientX, box.top + down * scale - event.clientY);
      if (far < least) [best, least] = [found, far];
    }
    if (best) show(best);
  }

  // Along a series, or to the nearest point of another one.
  function step(along, over) {
    if (!at) return points[0];
    const rows = series.length;
    if (along) return points.find((p) => p.row === at.row && p.column === at.column + along) || at;
    for (let row = (at.row + over + rows) % rows; row !== at.row; row = (row + over + rows) % rows) {
      const others = points.filter((p) => p.row === row);
      const far = (p) => Math.abs(p.point[0] - at.point[0]);
      if (others.length) return others.reduce((a, b) => (far(b) < far(a) ? b : a));
    }
    return at;
  }

  const keys = {
    ArrowRight: () => step(1, 0),
    ArrowLeft: () => step(-1, 0),
    ArrowDown: () => step(0, 1),
    ArrowUp: () => step(0, -1),
    Home: () => points.find((p) => p.row === (at ? at.row : 0)),
    End: () => points.findLast((p) => p.row === (at ? at.row : 0)),
  };
  plot.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    if (!(event.key in keys) || !points.length || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(keys[event.key]() || points[0]);
  });
  plot.addEventListener("pointermove", nearest);
  plot.addEventListener("pointerdown", nearest);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  plot.addEventListener("blur", hide);
}

function player(root) {
  const films = [...root.querySelectorAll("video")];
  const controls = root.querySelector(".controls");
  const button = controls.querySelector("button"), range = controls.querySelector("input");
  const output = controls.querySelector("output"), speed = controls.querySelector("select");
  const seconds = Number(root.dataset.seconds), frame = Number(root.dataset.frame), slow = Number(root.dataset.slow);
  let playing = false;

  films.forEach((film) => film.removeAttribute("controls"));
  controls.hidden = false;

  function tell(time) {
    range.value = time * slow;
    // The last picture is shown for a moment, in which the episode's time stands still.
    const end = seconds - frame;
    const words = `${(Math.min(time, end) * slow).toFixed(2)} of ${(end * slow).toFixed(2)} s`;
    output.textContent = words;
    range.setAttribute("aria-valuetext", words);
  }

  function seek(time) {
    films.forEach((film) => { film.currentTime = time; });
    tell(time);
  }

  function follow() {
    if (!playing) return;
    const time = films[0].currentTime;
    for (const film of films.slice(1)) {
      if (Math.abs(film.currentTime - time) > 1.5 * frame) film.currentTime = time;
    }
    tell(time);
    requestAnimationFrame(follow);
  }

  async function play() {
    playing = true;
    button.textContent = "Pause";
    if (films[0].currentTime > seconds - frame) seek(0);
    await Promise.allSettled(films.map((film) => film.play()));
    requestAnimationFrame(follow);
  }

  function pause() {
    playing = false;
    button.textContent = "Play";
    films.forEach((film) => film.pause());
    seek(films[0].currentTime);
  }

  const toggle = () => (playing ? pause() : play());
  button.addEventListener("click", toggle);
  range.addEventListener("input", () => seek(Number(range.value) / slow));
  speed.addEventListener("change", () => films.forEach((film) => { film.playbackRate = Number(speed.value); }));
  films[0].addEventListener("ended", () => {
    if (!playing) return;
    seek(0);
    films.forEach((film) => film.play().catch(() => {}));
  });
  root.addEventListener("keydown", (event) => {
    if (event.key !== " " || event.target.closest("button, select, summary")) return;
    event.preventDefault();
    toggle();
  });
  tell(0);
}

document.querySelectorAll(".plot").forEach(chart);
document.querySelectorAll(".player[data-seconds]").forEach(player);

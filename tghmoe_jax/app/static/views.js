// Three plain views of a scan with one crosshair, drawn on 2D canvases from the numbers that the server sends.
// Axes: 0 slices toward Superior, 1 rows toward Posterior, 2 columns toward the patient's Left.

const VIEWS = [
  { name: "Axial", axis: 0, x: 2, y: 1, up: false, letters: "RLAP" }, // left, right, top, bottom of the view
  { name: "Coronal", axis: 1, x: 2, y: 0, up: true, letters: "RLSI" },
  { name: "Sagittal", axis: 2, x: 1, y: 0, up: true, letters: "APSI" },
];
const SIDES = [["L", "R"], ["P", "A"], ["S", "I"]]; // of x, y, z in mm: above and below 0
const READ = { int16: Int16Array, float32: Float32Array, uint8: Uint8Array };
const KEPT = 48; // slices in memory

export class Viewer {
  // fetchSlice(query) gives {type, buffer}; say(cross, pointer) shows two lines of text.
  constructor(element, fetchSlice, say) {
    Object.assign(this, { fetchSlice, say, boxes: [], strength: 0.45, model: false, channel: 0, kept: new Map() });
    this.views = VIEWS.map((view) => this.make(element, view));
    new ResizeObserver(() => this.draw()).observe(element);
  }

  make(element, view) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    const label = document.createElement("label");
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: 0, id: `slice-${view.axis}` });
    label.htmlFor = slider.id;
    canvas.tabIndex = 0;
    canvas.id = `view-${view.axis}`;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${view.name} view: arrow keys move the crosshair, Page Up and Down the slice`);
    const caption = document.createElement("figcaption");
    caption.append(label);
    figure.append(caption, canvas, slider);
    element.append(figure);
    const found = { ...view, canvas, label, slider, image: document.createElement("canvas"), turn: 0 };
    slider.oninput = () => this.move(view.axis, Number(slider.value));
    this.listen(found);
    return found;
  }

  listen(view) {
    const canvas = view.canvas;
    const keys = { ArrowLeft: [view.x, -1], ArrowRight: [view.x, 1], ArrowUp: [view.y, view.up ? 1 : -1],
      ArrowDown: [view.y, view.up ? -1 : 1], PageUp: [view.axis, 1], PageDown: [view.axis, -1] };
    canvas.onkeydown = (event) => {
      if (!(event.key in keys) || !this.scan) return;
      event.preventDefault();
      const [axis, step] = keys[event.key];
      this.move(axis, this.cross[axis] + step * (event.shiftKey ? 10 : 1));
    };
    canvas.onwheel = (event) => {
      event.preventDefault();
      if (this.scan) this.move(view.axis, this.cross[view.axis] - Math.sign(event.deltaY));
    };
    canvas.onpointerdown = (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.drag = { x: event.clientX, y: event.clientY, centre: this.centre, width: this.width };
      if (!event.shiftKey) this.point(view, event);
    };
    canvas.onpointerup = () => { this.drag = null; };
    canvas.onpointerleave = () => this.say(this.at(this.cross), "");
    canvas.onpointermove = (event) => {
      if (!this.scan) return;
      if (this.drag && event.shiftKey) {
        const scale = this.drag.width / 200;
        this.setWindow(this.drag.centre + (event.clientY - this.drag.y) * scale,
          Math.max(this.drag.width + (event.clientX - this.drag.x) * scale, 0.01), true);
      } else if (this.drag) this.point(view, event);
      const voxel = this.voxelAt(view, event);
      this.say(this.at(this.cross), voxel ? `Pointer: ${this.at(voxel, view)}` : "");
    };
  }

  open(scan) {
    this.scan = scan;
    this.cross = scan.shape.map((length) => Math.floor(length / 2));
    this.boxes = [];
    this.kept.clear();
    this.views.forEach((view) => { view.slider.max = scan.shape[view.axis] - 1; view.data = null; });
    return this.refresh();
  }

  close() { this.scan = null; this.kept.clear(); }

  // ---- changes ----------------------------------------------------------------------------------------------------

  move(axis, index) {
    this.cross[axis] = Math.min(Math.max(Math.round(index), 0), this.scan.shape[axis] - 1);
    return this.refresh();
  }

  moveTo(voxel) {
    voxel.forEach((index, axis) => {
      this.cross[axis] = Math.min(Math.max(Math.round(index), 0), this.scan.shape[axis] - 1);
    });
    return this.refresh();
  }

  setWindow(centre, width, tell) {
    Object.assign(this, { centre, width });
    if (this.onwindow) this.onwindow(centre, width, tell);
    this.draw();
  }

  setModel(model, channel) {
    Object.assign(this, { model, channel });
    return this.refresh();
  }

  setOverlay(boxes, strength) { Object.assign(this, { boxes, strength }); this.draw(); }

  async refresh() {
    const asked = this.asked = (this.asked || 0) + 1;
    await Promise.all(this.views.map(async (view) => {
      const turn = ++view.turn;
      const data = await this.load(view);
      if (turn === view.turn && data && this.scan) { view.data = data; this.drawView(view); }
    }));
    if (!this.scan || asked !== this.asked) return; // a later move tells its own place
    this.say(this.at(this.cross));
    if (this.onmove) this.onmove();
  }

  // Millimetres (LPS) of a voxel's centre, null where the scan is not placed.
  mm(voxel) {
    return this.scan.affine && this.scan.affine.slice(0, 3)
      .map((row) => row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + row[3]);
  }

  async load(view) {
    const scan = this.scan, axis = scan.model.axes[view.axis];
    const index = this.model ? this.inModel(view.axis, this.cross[view.axis]) : this.cross[view.axis];
    const length = this.model ? axis.length : this.scan.shape[view.axis];
    const query = `axis=${view.axis}&index=${Math.min(index, length - 1)}` + (this.model ? `&channel=${this.channel}` : "");
    if (!this.kept.has(query)) {
      const found = await this.fetchSlice(query);
      if (!found || scan !== this.scan) return null; // another scan was opened meanwhile
      this.kept.set(query, { values: new READ[found.type](found.buffer), model: this.model, index });
      if (this.kept.size > KEPT) this.kept.delete(this.kept.keys().next().value);
    }
    return this.kept.get(query);
  }

  inModel(axis, index) {
    const { step, pad } = this.scan.model.axes[axis];
    return Math.floor((index + 0.5 + pad) / step);
  }

  // ---- drawing ----------------------------------------------------------------------------------------------------

  // The voxel at a place in mm (LPS), the inverse of `mm`, by Cramer's rule.
  voxelOf(mm) {
    const columns = [0, 1, 2].map((axis) => this.scan.affine.slice(0, 3).map((row) => row[axis]));
    const at = mm.map((value, i) => value - this.scan.affine[i][3]);
    const volume = (a, b, c) => a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) +
      a[2] * (b[0] * c[1] - b[1] * c[0]);
    return [0, 1, 2].map((axis) => volume(...columns.with(axis, at)) / volume(...columns));
  }

  draw() { if (this.scan) this.views.forEach((view) => this.drawView(view)); }

  // What of an axis a view shows, in voxels from the outer side of voxel 0, and how many pixels the image has there.
  span(axis, model) {
    if (!model) return { low: 0, length: this.scan.shape[axis], pixels: this.scan.shape[axis] };
    const { length, step, pad } = this.scan.model.axes[axis];
    return { low: -pad, length: length * step, pixels: length };
  }

  drawView(view) {
    const { canvas, data } = view;
    view.slider.value = this.cross[view.axis];
    view.label.textContent = `${view.name}: slice ${this.cross[view.axis] + 1} of ${this.scan.shape[view.axis]}`;
    view.slider.setAttribute("aria-valuetext", view.label.textContent);
    const side = Math.round(canvas.clientWidth * devicePixelRatio);
    if (!data || !side) return;
    if (canvas.width !== side) canvas.width = canvas.height = side;
    const [x, y] = [this.span(view.x, data.model), this.span(view.y, data.model)];
    this.paint(view, x.pixels, y.pixels);
    const [sx, sy] = [this.scan.spacing[view.x], this.scan.spacing[view.y]];
    const scale = side / Math.max(x.length * sx, y.length * sy);
    view.place = { kx: scale * sx, ky: scale * sy, x, y, left: (side - x.length * sx * scale) / 2,
      top: (side - y.length * sy * scale) / 2 };
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, side, side);
    context.imageSmoothingEnabled = !data.model;
    context.drawImage(view.image, view.place.left, view.place.top, x.length * view.place.kx, y.length * view.place.ky);
    this.drawBoxes(context, view);
    this.drawCross(context, view, side);
    if (this.scan.affine) this.drawLetters(context, view, side);
  }

  paint(view, wide, high) {
    const { image, data } = view;
    Object.assign(image, { width: wide, height: high });
    const context = image.getContext("2d");
    const picture = context.createImageData(wide, high);
    const pixels = new Uint32Array(picture.data.buffer);
    const [low, factor] = data.model ? [0, 1] : [this.centre - this.width / 2, 255 / this.width];
    for (let row = 0; row < high; row++) {
      const from = (view.up ? high - 1 - row : row) * wide;
      for (let column = 0; column < wide; column++) {
        const grey = Math.min(Math.max((data.values[from + column] - low) * factor, 0), 255) & 255;
        pixels[row * wide + column] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
      }
    }
    context.putImageData(picture, 0, 0);
  }

  // Pixel of an edge of voxels along the view's x or y.
  px(view, edge) { return view.place.left + (edge - view.place.x.low) * view.place.kx; }

  py(view, edge) {
    const { top, ky, y } = view.place;
    return view.up ? top + (y.low + y.length - edge) * ky : top + (edge - y.low) * ky;
  }

  drawBoxes(context, view) {
    const middle = this.cross[view.axis] + 0.5;
    for (const box of this.boxes) {
      const [low, high] = box.edges[view.axis];
      if (middle < low || middle >= high) continue;
      const [x0, x1] = box.edges[view.x].map((edge) => this.px(view, edge));
      const [y0, y1] = box.edges[view.y].map((edge) => this.py(view, edge));
      context.globalAlpha = this.strength * box.shade;
      context.fillStyle = box.colour;
      context.fillRect(x0, Math.min(y0, y1), x1 - x0, Math.abs(y1 - y0));
      context.globalAlpha = 1;
      if (box.outline) {
        Object.assign(context, { strokeStyle: box.colour, lineWidth: 2 });
        context.strokeRect(x0, Math.min(y0, y1), x1 - x0, Math.abs(y1 - y0));
      }
    }
  }

  drawCross(context, view, side) {
    const x = Math.round(this.px(view, this.cross[view.x] + 0.5)) + 0.5;
    const y = Math.round(this.py(view, this.cross[view.y] + 0.5)) + 0.5;
    Object.assign(context, { strokeStyle: "#5fd35f", lineWidth: 1 });
    context.beginPath();
    for (const [from, to] of [[0, -8], [8, side]]) { // free in the middle
      context.moveTo(x, from ? y + 8 : 0); context.lineTo(x, from ? side : y + to);
      context.moveTo(from ? x + 8 : 0, y); context.lineTo(from ? side : x + to, y);
    }
    context.stroke();
  }

  drawLetters(context, view, side) {
    const size = Math.max(14 * devicePixelRatio, side / 22);
    Object.assign(context, { font: `bold ${size}px sans-serif`, fillStyle: "#ffe34d", textAlign: "center",
      textBaseline: "middle", strokeStyle: "#000", lineWidth: 3 });
    const places = [[size * 0.6, side / 2], [side - size * 0.6, side / 2], [side / 2, size * 0.7], [side / 2, side - size * 0.7]];
    places.forEach(([x, y], i) => { context.strokeText(view.letters[i], x, y); context.fillText(view.letters[i], x, y); });
  }

  // ---- where and what ---------------------------------------------------------------------------------------------

  voxelAt(view, event) {
    if (!view.place) return null;
    const box = view.canvas.getBoundingClientRect();
    const { left, top, kx, ky, x, y } = view.place;
    const voxel = [...this.cross];
    voxel[view.x] = Math.floor(((event.clientX - box.left) * view.canvas.width / box.width - left) / kx + x.low);
    const down = ((event.clientY - box.top) * view.canvas.height / box.height - top) / ky;
    voxel[view.y] = Math.floor(view.up ? y.low + y.length - down : y.low + down);
    return voxel.every((index, axis) => index >= 0 && index < this.scan.shape[axis]) ? voxel : null;
  }

  point(view, event) {
    const voxel = this.scan && this.voxelAt(view, event);
    if (voxel) this.moveTo(voxel);
  }

  // Millimetres of a voxel's centre in the patient, and its value where a view holds it.
  at(voxel, view) {
    if (!this.scan) return "";
    const named = `slice ${voxel[0] + 1}, row ${voxel[1] + 1}, column ${voxel[2] + 1}`;
    const parts = [named];
    if (this.scan.affine) {
      parts.push(this.mm(voxel).map((value, axis) => `${SIDES[axis][value < 0 ? 1 : 0]} ${Math.abs(value).toFixed(1)}`).join(", ") + " mm");
    }
    const own = view || this.views[0];
    const index = this.model ? this.inModel(own.axis, voxel[own.axis]) : voxel[own.axis];
    if (!own.data || own.data.model !== this.model || own.data.index !== index) return parts.join("; "); // not yet there
    if (!this.model) {
      const value = own.data.values[voxel[own.y] * this.scan.shape[own.x] + voxel[own.x]];
      if (value !== undefined) parts.push(`${Number(value.toFixed(3))}${this.scan.unit === "HU" ? " HU" : ""}`);
    } else {
      const [x, y] = [this.inModel(own.x, voxel[own.x]), this.inModel(own.y, voxel[own.y])];
      parts.push(`level ${own.data.values[y * this.scan.model.axes[own.x].length + x]} of 255 for the model`);
    }
    return parts.join("; ");
  }
}

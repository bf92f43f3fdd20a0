// NiiVue beside the plain views, where the browser has WebGL 2: loaded when it is first wanted, from this server.

function loaded() {
  if (globalThis.niivue) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.onload = resolve;
    script.onerror = () => reject(new Error("the 3D viewer could not be loaded; use the plain views."));
    script.src = "/niivue.js";
    document.head.append(script);
  });
}

export class WebglViewer {
  // moved(mm) is told where the user puts the crosshair, in mm (LPS).
  constructor(canvas, moved) { Object.assign(this, { canvas, moved }); }

  static possible() { return Boolean(document.createElement("canvas").getContext("webgl2")); }

  async open(buffer) {
    await loaded();
    if (!this.viewer) {
      const { Niivue, SHOW_RENDER } = globalThis.niivue;
      this.viewer = new Niivue({ backColor: [0, 0, 0, 1], isRadiologicalConvention: true, sagittalNoseLeft: true,
        dragAndDropEnabled: false, logLevel: "error", multiplanarShowRender: SHOW_RENDER.ALWAYS });
      await this.viewer.attachToCanvas(this.canvas);
      this.viewer.onLocationChange = ({ mm }) => {
        if (this.silent || !this.viewer.volumes.length) return;
        this.moved([-mm[0], -mm[1], mm[2]]); // not its mm2vox, whose voxels are those of the volume turned to RAS
      };
    }
    this.close();
    await this.viewer.loadFromArrayBuffer(buffer, "scan.nii");
  }

  close() { while (this.viewer?.volumes.length) this.viewer.removeVolume(this.viewer.volumes[0]); }

  get isOpen() { return Boolean(this.viewer?.volumes.length); }

  // A place in mm (LPS), where the plain views have their crosshair.
  moveTo([left, back, head]) {
    if (!this.isOpen) return;
    this.silent = true; // what it tells of this is not news
    this.viewer.scene.crosshairPos = this.viewer.mm2frac([-left, -back, head]);
    this.viewer.drawScene();
    this.silent = false;
  }

  setWindow(centre, width) {
    if (!this.isOpen) return;
    Object.assign(this.viewer.volumes[0], { cal_min: centre - width / 2, cal_max: centre + width / 2 });
    this.viewer.updateGLVolume();
  }
}

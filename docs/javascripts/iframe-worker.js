// Browsers refuse workers to a page that was opened from the disk, and the search of the site is a worker. There, and
// only there, it runs in a hidden frame of the page instead. The name of this file tells Zensical that there is such a
// replacement; it would load one from the network otherwise.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      frame.onload = () => {
        this.scope = frame.contentWindow;
        this.scope.postMessage = (data) => {
          const event = new MessageEvent("message", { data });
          this.dispatchEvent(event);
          this.onmessage?.(event);
        };
        const script = frame.contentDocument.createElement("script");
        script.src = address;
        script.onload = () => {
          this.loaded = true;
          this.waiting.splice(0).forEach((data) => this.postMessage(data));
        };
        frame.contentDocument.body.append(script);
      };
      this.frame = frame;
      document.body.append(frame);
    }

    postMessage(data) {
      if (!this.loaded) return void this.waiting.push(data);
      this.scope.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.frame.remove();
    }
  };
}

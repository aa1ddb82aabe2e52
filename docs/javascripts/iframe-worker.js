// Browsers refuse workers to a page that was opened from the disk, and the search of the site is a worker. There, and
// only there, it runs in a hidden frame of the page instead. The name of this file tells Zensical that there is such a
// replacement; it would load one from the network otherwise.
if (location.protocol === "file:") {
  // as between real workers: what arrives is a copy, and arrives later
  const send = (data, arrive) => {
    const copy = structuredClone(data);
    setTimeout(() => arrive(new MessageEvent("message", { data: copy })));
  };

  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "<!doctype html>";
      this.started = new Promise((resolve) => {
        this.frame.onload = () => {
          const scope = this.frame.contentWindow;
          scope.postMessage = (data) =>
            send(data, (event) => {
              this.dispatchEvent(event);
              this.onmessage?.(event);
            });
          const script = scope.document.createElement("script");
          script.src = new URL(address, location);
          script.onload = () => resolve(scope);
          scope.document.body.append(script);
        };
      });
      document.body.append(this.frame);
    }

    postMessage(data) {
      this.started.then((scope) => send(data, (event) => scope.dispatchEvent(event)));
    }

    terminate() {
      this.frame.remove();
    }
  };
}

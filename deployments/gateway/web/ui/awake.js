// Keeps the screen on during a conversation and tells the system's media controls of it, where a browser can.

export class Awake {
  #lock = null;
  #on = false;

  constructor() {
    document.addEventListener("visibilitychange", () => this.#hold()); // a hidden page loses its lock
  }

  /** `{title, artist, end(), mute()}` */
  start({ title, artist, end, mute }) {
    this.#on = true;
    this.#hold();
    const { mediaSession } = navigator;
    if (!mediaSession) return;
    mediaSession.metadata = new MediaMetadata({ title, artist, album: "PersonaPlex" });
    mediaSession.playbackState = "playing";
    this.#act({ hangup: end, stop: end, togglemicrophone: mute });
  }

  stop() {
    this.#on = false;
    this.#lock?.release();
    this.#lock = null;
    const { mediaSession } = navigator;
    if (!mediaSession) return;
    mediaSession.metadata = null;
    mediaSession.playbackState = "none";
    this.#act({ hangup: null, stop: null, togglemicrophone: null });
  }

  set muted(muted) {
    if (this.#on) navigator.mediaSession?.setMicrophoneActive?.(!muted)?.catch?.(() => {});
  }

  #act(actions) {
    for (const [name, action] of Object.entries(actions)) {
      try {
        navigator.mediaSession.setActionHandler(name, action);
      } catch {
        // an action this browser does not know
      }
    }
  }

  async #hold() {
    if (!this.#on || document.hidden || !navigator.wakeLock) return;
    try {
      const lock = await navigator.wakeLock.request("screen");
      if (this.#on) this.#lock = lock;
      else lock.release();
    } catch {
      // low battery, or not allowed: the screen goes off as always
    }
  }
}

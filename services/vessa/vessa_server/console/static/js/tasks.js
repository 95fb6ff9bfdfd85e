// @ts-check
/** Work through tasks a few at once, with progress and cancel. */

/** @typedef {{name: string, run: (signal: AbortSignal) => Promise<void>}} Task */
/** @typedef {{done: number, total: number, failed: string[], running: boolean, cancelled: number}} Progress */

export class TaskQueue {
  /** @param {number} atOnce @param {(progress: Progress) => void} onChange */
  constructor(atOnce, onChange) {
    this.atOnce = atOnce;
    this.onChange = onChange;
    /** @type {Progress} */
    this.progress = { done: 0, total: 0, failed: [], running: false, cancelled: 0 };
    /** @type {Task[]} */
    this.waiting = [];
    this.abort = new AbortController();
    this.active = 0;
  }

  /** Add tasks; resolves when the queue is empty. @param {Task[]} tasks @returns {Promise<void>} */
  async add(tasks) {
    if (!this.progress.running) {
      this.abort = new AbortController();
      this._set({ done: 0, total: 0, failed: [], running: true, cancelled: 0 });
    }
    this.waiting.push(...tasks);
    this._set({ total: this.progress.total + tasks.length });
    const free = Math.max(0, this.atOnce - this.active);
    await Promise.all(Array.from({ length: free }, () => this._work()));
    if (!this.active) this._set({ running: false });
  }

  /** Drop the waiting tasks and abort those in progress. */
  cancel() {
    this._set({ cancelled: this.progress.cancelled + this.waiting.length });
    this.waiting.length = 0;
    this.abort.abort();
  }

  async _work() {
    this.active++;
    const { signal } = this.abort;
    for (let task = this.waiting.shift(); task; task = this.waiting.shift()) {
      try {
        await task.run(signal);
        this._set({ done: this.progress.done + 1 });
      } catch (error) {
        if (signal.aborted) this._set({ cancelled: this.progress.cancelled + 1 });
        else {
          const why = `${task.name}: ${/** @type {Error} */ (error).message}`;
          this._set({ done: this.progress.done + 1, failed: [...this.progress.failed, why] });
        }
      }
    }
    this.active--;
  }

  /** @param {Partial<Progress>} change */
  _set(change) {
    this.progress = { ...this.progress, ...change };
    this.onChange(this.progress);
  }
}

// Types of what the console uses from uPlot; ours, for tsc --noEmit.
export default class uPlot {
  constructor(options: object, data: unknown, into: HTMLElement);
  destroy(): void;
}

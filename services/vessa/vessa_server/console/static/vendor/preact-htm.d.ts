// Types of what the console uses from Preact and htm; ours, for tsc --noEmit.
type Update<T> = (next: T | ((now: T) => T)) => void;
export function html(strings: TemplateStringsArray, ...values: unknown[]): any;
export function render(tree: unknown, into: Element): void;
export function useState<T>(first: T): [T, Update<T>];
export function useEffect(run: () => void | (() => void), on?: unknown[]): void;
export function useRef<T>(first: T): { current: T };

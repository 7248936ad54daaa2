// Chat templates are not trusted, and `@huggingface/jinja` runs them for as long as they like. What it
// evaluates goes through one method, which looks at the clock here. That holds for the one version that
// package.json names; test/text.test.ts fails where it changes.
import { Interpreter } from "@huggingface/jinja";

const SECONDS = 2;
/** Of a range, as in the sandbox of the original: it is made in one step. */
const MOST_OF_RANGE = 100_000;

interface Range {
  value(args: readonly { readonly value: number }[], scope: unknown): unknown;
}

const { evaluate, run } = Interpreter.prototype;
let endMs = Infinity;

Interpreter.prototype.evaluate = function (statement, environment) {
  if (performance.now() > endMs) throw new Error(`it takes longer than ${SECONDS} seconds`);
  return evaluate.call(this, statement, environment);
};

Interpreter.prototype.run = function (program) {
  limitRange(this.global.variables.get("range") as unknown as Range);
  endMs = performance.now() + 1000 * SECONDS;
  try {
    return run.call(this, program);
  } finally {
    endMs = Infinity;
  }
};

function limitRange(range: Range): void {
  const { value } = range;
  range.value = (args, scope) => {
    const [first = 0, second, step = 1] = args.map((own) => own.value);
    const [start, stop] = second === undefined ? [0, first] : [first, second];
    if ((stop - start) / step > MOST_OF_RANGE) {
      throw new Error(`a range of more than ${MOST_OF_RANGE.toLocaleString("en-US")} numbers is too long`);
    }
    return value.call(range, args, scope);
  };
}

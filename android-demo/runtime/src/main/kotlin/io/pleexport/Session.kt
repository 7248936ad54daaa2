package io.pleexport

import java.nio.FloatBuffer
import java.util.concurrent.CancellationException

/**
 * An open graph with the caches and states of one text: what a runtime answers. One thread at a
 * time, but for `stop`.
 */
internal interface Session : AutoCloseable {
    /** Most tokens of one call. */
    val chunk: Int

    /**
     * Logits after the next tokens.
     *
     * @param count how many tokens.
     * @param keep how many of the last positions want logits; 0 for all.
     * @param fill puts looked-up vectors into the graph's inputs, by name; each buffer has room for
     *   what its input takes, and is to be filled.
     * @return `[n, vocab]`, which the next call overwrites.
     * @throws Stopped `stop` was called; the session is as it was before this call.
     */
    fun feed(count: Int, keep: Int, fill: (Map<String, FloatBuffer>) -> Unit): FloatBuffer

    /**
     * Forgets the last tokens of the last `feed`; once for each.
     *
     * @param count 1 or more, and fewer than that `feed` had.
     * @return how many tokens were forgotten: `count`, or all of that `feed` where only what was
     *   held before it is still known. Those that were not meant to be have to be fed again.
     */
    fun rewind(count: Int): Int

    /** Forgets the text so far. */
    fun reset()

    /** Ends a call that another thread is in, and refuses more until `resume`. */
    fun stop()

    /** Takes calls again. */
    fun resume()
}

/** A call was ended by `Session.stop`; to coroutines this is their own cancellation. */
internal class Stopped : CancellationException("stopped")

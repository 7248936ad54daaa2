package io.pleexport

import java.nio.FloatBuffer
import java.util.concurrent.locks.ReentrantLock

private const val OWN_RUNNER =
    "take a `Runner` for each text at a time; they share what they map of the bundle"

/**
 * One text: its ids so far, and a session that has read them.
 *
 * @param context most tokens of a text.
 * @throws BundleError the blob has no table for a graph input, or one of another width.
 */
internal class Reader(
    private val blob: Blob,
    private val session: Session,
    private val contract: GraphContract,
    val context: Int,
) : AutoCloseable {
    val chunk: Int
        get() = session.chunk

    /** The text so far. */
    var ids: IntArray = IntArray(0)
        private set

    /** How many of the last ids are guesses that have not come true yet. */
    var guessed = 0
        private set

    /** How many rows were looked up since `begin`. */
    var rowsRead = 0L
        private set

    private val lock = ReentrantLock()

    @Volatile private var turn = 0L

    @Volatile private var closed = false

    init {
        for (lookup in contract.lookupInputs) {
            if (
                blob.shapes[lookup.table]?.map { it.toString() } !=
                    lookup.shape.drop(2).map { it.toString() }
            ) {
                throw BundleError(
                    "`${blob.file}` has no table `${lookup.table}` of shape ${lookup.shape.drop(2)}",
                    "files of two bundles may be mixed; copy the bundle again, or rebuild it",
                )
            }
        }
    }

    /**
     * Keeps other threads out, and other texts from what has been read.
     *
     * @param turn of a text that goes on, as it was given when it began; null for one that begins.
     * @throws InputError another thread is at work, or another text has begun since.
     * @throws CheckFailed a file that is mapped was cut.
     */
    fun <T> alone(turn: Long? = null, body: (turn: Long) -> T): T {
        if (!lock.tryLock()) throw InputError("another thread is using this runner", OWN_RUNNER)
        try {
            if (closed) throw InputError("this runner is closed", "open another one on the bundle")
            if (turn == null) {
                this.turn++
                session.resume()
            } else if (turn != this.turn) {
                throw InputError(
                    "another call has used this runner since, so this text cannot go on",
                    OWN_RUNNER,
                )
            }
            return body(this.turn)
        } catch (err: InternalError) {
            // So the JVM calls pages of a map that are no longer there. It may do so some time after
            // they were read; systems without a JVM end the process.
            throw CheckFailed(
                "`${blob.file}` is damaged: a file of rows has become shorter while it was open",
                COPY_AGAIN,
                err,
            )
        } finally {
            lock.unlock()
        }
    }

    /** Ends what another thread reads; its call throws `Stopped`. */
    fun stop(turn: Long) {
        if (turn == this.turn) session.stop()
    }

    /**
     * Logits `[n, vocab]` after the next tokens, fed in pieces; overwritten by the next call.
     * Earlier guesses are forgotten.
     *
     * @param keep n, how many of the last piece's positions want logits; 0 for all of every piece.
     * @param guessed how many of the last tokens are guesses, fewer than a call takes.
     * @param each gets the logits of every piece.
     * @throws InputError an id without a row, or more tokens than the context has positions.
     */
    fun read(
        tokenIds: IntArray,
        keep: Int,
        guessed: Int = 0,
        each: (FloatBuffer) -> Unit = {},
    ): FloatBuffer {
        forgetGuesses()
        val rows = blob.rowIds(tokenIds)
        checkLength(ids.size + rows.size)
        // Page faults, one after the other, would take forty times as long from a cold disk.
        blob.prefetch(rows)
        lateinit var logits: FloatBuffer
        for (begin in tokenIds.indices step chunk) {
            val end = minOf(begin + chunk, tokenIds.size)
            val piece = rows.copyOfRange(begin, end)
            logits = session.feed(end - begin, keep) { lookup(piece, it) }
            ids += tokenIds.copyOfRange(begin, end)
            rowsRead += end - begin
            each(logits)
        }
        this.guessed = guessed
        return logits
    }

    /** The first guess came true. */
    fun accept() {
        guessed--
    }

    /** Goes back to what is certain, or further where the session cannot stop there. */
    fun forgetGuesses() {
        if (guessed == 0) return
        val forgotten = session.rewind(guessed)
        ids = ids.copyOf(ids.size - forgotten)
        guessed = 0
    }

    /** Forgets the text so far. */
    fun reset() {
        ids = IntArray(0)
        guessed = 0
        session.reset()
    }

    /** Counts rows from here on. */
    fun countRows() {
        rowsRead = 0
    }

    /** Refuses a text of more tokens than the context has positions. */
    fun checkLength(length: Int) {
        if (length > context) {
            throw InputError(
                "$length tokens exceed the bundle's context of $context",
                "shorten the prompt, or build with a larger `--context`",
            )
        }
    }

    /** Ends what runs, and gives everything back. */
    override fun close() {
        if (!closed) session.stop()
        lock.lock()
        try {
            if (!closed) session.close()
            closed = true
        } finally {
            lock.unlock()
        }
    }

    /** Puts into each graph input the vectors of the new tokens, or of all tokens so far. */
    private fun lookup(rows: LongArray, into: Map<String, FloatBuffer>) {
        val (whole, own) = contract.lookupInputs.partition { it.wholeText }
        blob.lookup(rows, own.map { it.table to into.getValue(it.name) })
        if (whole.isNotEmpty()) {
            blob.lookup(blob.rowIds(ids) + rows, whole.map { it.table to into.getValue(it.name) })
        }
    }
}

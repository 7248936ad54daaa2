package io.pleexport

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer

/** Tokens of one call: more are no faster, and scores of more take more memory. */
private const val PREFILL_CHUNK = 256
private const val MOST_THREADS = 256

/**
 * Opens an ONNX graph of a bundle.
 *
 * @param threads 0 for one a core.
 * @param spin whether threads spin while they wait for work.
 * @param logLevel of ONNX Runtime, which says of a cache that is copied at `WARNING`.
 * @throws InputError an impossible number of threads.
 * @throws BundleError the files cannot be loaded, or contradict the contract.
 * @throws CheckFailed a file does not match its checksums.
 */
internal fun openOnnxSession(
    bundle: Bundle,
    threads: Int,
    spin: Boolean,
    logLevel: OrtLoggingLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL,
): OnnxSession {
    if (threads !in 0..MOST_THREADS) {
        throw InputError(
            "threads is $threads; it must be 0 to $MOST_THREADS",
            "0 takes one for each core",
        )
    }
    val artifact = bundle.decoder
    val graph = File(bundle.path, artifact.files[0])
    // Of a damaged graph ONNX Runtime would say things of its own.
    bundle.checksums?.let { checkFiles(listOf(graph), it) }
    val environment = OrtEnvironment.getEnvironment()
    environment.setTelemetry(false)
    val weights = artifact.files.drop(1).map { File(bundle.path, it) }
    val opened =
        checkedBeside(weights, bundle.checksums) {
            OrtSession.SessionOptions().use { options ->
                options.setIntraOpNumThreads(threads)
                options.setSessionLogLevel(logLevel)
                // A plan of all memory of a call is kept for each number of tokens, and none saves
                // time.
                options.setMemoryPatternOptimization(false)
                // Smaller pieces of work at the end of an operator: threads wait less for each
                // other.
                options.addConfigEntry("session.dynamic_block_base", "4")
                options.addConfigEntry("session.intra_op.allow_spinning", if (spin) "1" else "0")
                try {
                    environment.createSession(graph.path, options)
                } catch (err: OrtException) {
                    throw BundleError(
                        "`$graph` cannot be loaded: ${err.message}",
                        "`pleexport verify BUNDLE` tells whether its files are damaged",
                        err,
                    )
                }
            }
        }
    try {
        checkGraph(opened, artifact.contract, graph)
        return OnnxSession(environment, opened, artifact.contract, bundle.manifest.context, graph)
    } catch (err: PleexportError) {
        opened.close()
        throw err
    }
}

/** An open ONNX graph; caches are bound as input and output at once, so that none is copied. */
internal class OnnxSession(
    private val environment: OrtEnvironment,
    private val session: OrtSession,
    private val contract: GraphContract,
    context: Int,
    private val graph: File,
) : Session {
    override val chunk = minOf(PREFILL_CHUNK, contract.tokensPerCall ?: PREFILL_CHUNK)
    private val held = HeldTensors(environment, contract, context, chunk)
    private val stepOptions = OrtSession.RunOptions()

    // A piece of a prompt needs much memory, which the steps behind it would keep for nothing.
    private val pieceOptions =
        OrtSession.RunOptions().apply {
            addRunConfigEntry("memory.enable_memory_arena_shrinkage", "cpu:0")
        }
    private val inputs = LinkedHashMap<String, OnnxTensor>()
    private val outputs = LinkedHashMap<String, OnnxTensor>()
    private val floats = (contract.lookupInputs.map { it.name } + LOGITS).associateWith { Floats() }
    private val positionIds = direct(8 * chunk).asLongBuffer()
    private val numLogits = direct(8).asLongBuffer()
    private val scalar = OnnxTensor.createTensor(environment, numLogits, longArrayOf())
    private var call: Call? = null
    private var position = 0
    private var lastCount = 0

    @Volatile private var stopped = false

    /** Tensors of calls of one shape, which are made again when it changes. */
    private class Call(
        val count: Int,
        val total: Int?,
        val keep: Int,
        val vectors: Map<String, FloatBuffer>,
        val logits: FloatBuffer,
        val tensors: List<OnnxTensor>,
    )

    override fun feed(
        count: Int,
        keep: Int,
        fill: (Map<String, FloatBuffer>) -> Unit,
    ): FloatBuffer {
        held.bind(position + count, inputs, outputs)
        val now = callFor(count, keep)
        now.vectors.values.forEach { it.clear() }
        fill(now.vectors)
        for (i in 0 until count) positionIds.put(i, (position + i).toLong())
        numLogits.put(0, keep.toLong())
        run(if (count > 1) pieceOptions else stepOptions)
        held.swap()
        position += count
        lastCount = count
        now.logits.clear()
        return now.logits
    }

    override fun rewind(count: Int): Int {
        // Caches mask what lies behind the text, but a state has taken it in.
        val forgotten = if (contract.states.isEmpty()) count else lastCount
        held.swap()
        position -= forgotten
        return forgotten
    }

    override fun reset() {
        position = 0
        held.clear()
    }

    override fun stop() {
        stopped = true
        for (each in listOf(stepOptions, pieceOptions)) each.setTerminate(true)
    }

    override fun resume() {
        stopped = false
        for (each in listOf(stepOptions, pieceOptions)) each.setTerminate(false)
    }

    override fun close() {
        // A run with a closed tensor ends the process, so the session goes first.
        session.close()
        call?.tensors?.forEach(OnnxTensor::close)
        scalar.close()
        held.close()
        floats.values.forEach(Floats::close)
        for (each in listOf(stepOptions, pieceOptions)) each.close()
    }

    private fun run(options: OrtSession.RunOptions) {
        if (stopped) throw Stopped()
        try {
            // All outputs are pinned: the result owns nothing.
            session.run(inputs, emptySet(), outputs, options).close()
        } catch (err: OrtException) {
            // Nothing is swapped and no position counted. What was half written into caches lies
            // behind the text, as after going back: docs/graph-contract.md.
            if (stopped) throw Stopped()
            throw BundleError(
                "`$graph` cannot be run: ${err.message}",
                "`pleexport verify BUNDLE` tells whether its files are damaged",
                err,
            )
        }
    }

    private fun callFor(count: Int, keep: Int): Call {
        val total = (position + count).takeIf { contract.lookupInputs.any(LookupInput::wholeText) }
        call?.let {
            if (it.count == count && it.total == total && it.keep == keep) return it
            it.tensors.forEach(OnnxTensor::close)
        }
        val tensors = ArrayList<OnnxTensor>()
        val vectors =
            contract.lookupInputs.associate { lookup ->
                val shape =
                    lookup.shape
                        .map { it.size ?: (if (it.name == ALL_TOKENS) total!! else count).toLong() }
                        .toLongArray()
                val buffer = floats.getValue(lookup.name).front(shape.fold(1L, Math::multiplyExact))
                tensors +=
                    OnnxTensor.createTensor(environment, buffer, shape).also {
                        inputs[lookup.name] = it
                    }
                lookup.name to buffer
            }
        val positions = positionIds.duplicate().apply { limit(count) }
        tensors +=
            OnnxTensor.createTensor(environment, positions, longArrayOf(1, count.toLong())).also {
                inputs[POSITION_IDS] = it
            }
        inputs[NUM_LOGITS_TO_KEEP] = scalar
        val wanted = (if (keep == 0) count else keep).toLong()
        val logits = floats.getValue(LOGITS).front(wanted * contract.vocabSize)
        tensors +=
            OnnxTensor.createTensor(
                    environment,
                    logits,
                    longArrayOf(1, wanted, contract.vocabSize.toLong()),
                )
                .also { outputs[LOGITS] = it }
        return Call(count, total, keep, vectors, logits, tensors).also { call = it }
    }
}

/**
 * The tensors that a call hands to the next: caches in place, states in two sets that change roles.
 */
private class HeldTensors(
    private val environment: OrtEnvironment,
    private val contract: GraphContract,
    context: Int,
    chunk: Int,
) : AutoCloseable {
    private val slots = Slots(contract.caches, context, chunk)
    private val stateBytes = contract.states.map { it.shape.fold(4L, Math::multiplyExact) }
    private val memory =
        Memory(
            contract.caches.zip(slots.whole) { cache, most -> bytes(cache, most) } +
                stateBytes +
                stateBytes
        )
    private val bound = IntArray(contract.caches.size)
    private val caches = arrayOfNulls<OnnxTensor>(contract.caches.size)
    private var taken = states(contract.caches.size)
    private var given = states(contract.caches.size + contract.states.size)

    /** Makes room for a text of `positions`, and names what the next call takes and gives. */
    fun bind(
        positions: Int,
        inputs: MutableMap<String, OnnxTensor>,
        outputs: MutableMap<String, OnnxTensor>,
    ) {
        slots.grow(positions)?.forEachIndexed { i, slots ->
            grow(i, slots)
            inputs[contract.caches[i].input] = caches[i]!!
            for (output in contract.caches[i].outputs) outputs[output] = caches[i]!!
        }
        contract.states.forEachIndexed { i, state ->
            inputs[state.input] = taken[i]
            outputs[state.output] = given[i]
        }
    }

    /** Takes up what the call gave, or what it took. */
    fun swap() {
        taken = given.also { given = taken }
    }

    /** Begins a text. Caches mask what an old one left. */
    fun clear() {
        for (tensor in taken) {
            val values = tensor.bufferRef.get() as FloatBuffer
            for (i in 0 until values.capacity()) values.put(i, 0f)
        }
    }

    override fun close() {
        (caches.filterNotNull() + taken + given).forEach(OnnxTensor::close)
        memory.close()
    }

    private fun grow(i: Int, slots: Int) {
        val cache = contract.caches[i]
        val whole = memory.front(i, Math.toIntExact(bytes(cache, slots.toLong())))
        moveHeads(cache, whole, from = bound[i], to = slots)
        bound[i] = slots
        caches[i]?.close()
        val type =
            when (cache.dtype) {
                "fp32" -> OnnxJavaType.FLOAT
                "fp16" -> OnnxJavaType.FLOAT16
                else -> OnnxJavaType.INT8
            }
        val shape = longArrayOf(1, cache.heads.toLong(), slots.toLong(), cache.width.toLong())
        caches[i] = OnnxTensor.createTensor(environment, whole, shape, type)
    }

    /** Heads lie one after the other, so those behind the first move up as slots are added. */
    private fun moveHeads(cache: CacheInput, whole: ByteBuffer, from: Int, to: Int) {
        val slotBytes = cache.width * cache.elementBytes
        val head = ByteArray(if (from == to) 0 else from * slotBytes)
        if (head.isEmpty()) return
        for (h in cache.heads - 1 downTo 1) { // the last one first
            whole.duplicate().apply { position(h * from * slotBytes) }.get(head)
            whole.duplicate().apply { position(h * to * slotBytes) }.put(head)
        }
    }

    private fun states(first: Int): List<OnnxTensor> =
        contract.states.mapIndexed { i, state ->
            val values = memory.front(first + i, Math.toIntExact(stateBytes[i])).asFloatBuffer()
            OnnxTensor.createTensor(environment, values, state.shape)
        }

    private fun bytes(cache: CacheInput, slots: Long): Long =
        listOf(cache.heads.toLong(), cache.width.toLong(), cache.elementBytes.toLong())
            .fold(slots, Math::multiplyExact)
}

/** Refuses a graph whose inputs and outputs are not those of the contract. */
private fun checkGraph(session: OrtSession, contract: GraphContract, graph: File) {
    val held: List<Held> = contract.caches + contract.states
    val shapes =
        contract.lookupInputs.associate { it.name to it.shape.map(Dimension::toString) } +
            contract.caches.associate { it.input to it.shape.map(Dimension::toString) } +
            contract.states.associate { it.input to it.shape.map(Long::toString) }
    val inputs = session.inputInfo.mapValues { (_, node) -> dimensions(node.info as? TensorInfo) }
    val outputs = session.outputInfo
    val expected = shapes.keys + POSITION_IDS + NUM_LOGITS_TO_KEEP
    val names = sortedSetOf<String>()
    names += (expected - inputs.keys) + (inputs.keys - expected)
    names += shapes.filter { (name, shape) -> inputs[name] != shape }.keys
    names += held.filter { it.output !in outputs }.map { it.input }
    names += contract.caches.flatMap { it.sharedOutputs } - outputs.keys
    if (dimensions(outputs[LOGITS]?.info as? TensorInfo).lastOrNull() != "${contract.vocabSize}") {
        names += LOGITS
    }
    if (names.isNotEmpty()) {
        throw BundleError(
            "`$graph` and the manifest disagree about ${names.joinToString()}",
            "files of two bundles may be mixed; copy the bundle again, or rebuild it",
        )
    }
}

/** A shape as the manifest has it: numbers and names. */
private fun dimensions(info: TensorInfo?): List<String> {
    val names = info?.dimensionNames ?: return emptyList()
    return info.shape.mapIndexed { i, size -> if (size < 0) names[i] else size.toString() }
}

private fun direct(bytes: Int): ByteBuffer =
    ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

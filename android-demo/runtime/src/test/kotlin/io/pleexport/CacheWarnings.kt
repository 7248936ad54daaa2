package io.pleexport

import ai.onnxruntime.OrtLoggingLevel
import java.io.File

/**
 * Feeds a bundle while ONNX Runtime says on standard error what it copies; tests/test_kotlin.py
 * reads that. With a second argument the caches are given back apart, and then it has to say so.
 */
object CacheWarnings {
    @JvmStatic
    fun main(arguments: Array<String>) {
        val bundle = Bundle(File(arguments[0]))
        val session = openOnnxSession(bundle, 1, false, OrtLoggingLevel.ORT_LOGGING_LEVEL_WARNING)
        if (arguments.size > 1) session.separateOutputs()
        for (count in listOf(5, 1, 200, 1).map { it.coerceAtMost(session.chunk) }) session.feed(count, 1) {}
        session.close()
    }

    /** Lets the session's caches be outputs of their own, which no user can. */
    private fun OnnxSession.separateOutputs() {
        feed(1, 1) {}
        val field =
            OnnxSession::class.java.getDeclaredField("outputs").apply { isAccessible = true }
        @Suppress("UNCHECKED_CAST")
        val outputs = field.get(this) as MutableMap<String, ai.onnxruntime.OnnxTensor>
        for ((name, tensor) in outputs.toMap()) {
            if (!name.startsWith("present.")) continue
            val info = tensor.info
            outputs[name] =
                ai.onnxruntime.OnnxTensor.createTensor(
                    ai.onnxruntime.OrtEnvironment.getEnvironment(),
                    java.nio.ByteBuffer.allocateDirect(tensor.byteBuffer.remaining()),
                    info.shape,
                    info.type,
                )
        }
    }
}

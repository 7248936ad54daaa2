package io.pleexport

import java.nio.ByteBuffer
import java.nio.ByteOrder

/**
 * The 64-bit hash XXH3 with seed 0, by which all checksums of a bundle are made.
 *
 * Source: github.com/Cyan4973/xxHash, doc/xxhash_spec.md. Longs are taken for unsigned ones.
 */
internal object Xxh3 {
    private const val PRIME32_1 = 0x9E3779B1L
    private const val PRIME32_2 = 0x85EBCA77L
    private const val PRIME32_3 = 0xC2B2AE3DL
    private const val PRIME64_1 = -0x61c8864e7a143579L
    private const val PRIME64_2 = -0x3d4d51c2d82b14b1L
    private const val PRIME64_3 = 0x165667B19E3779F9L
    private const val PRIME64_4 = -0x7a1435883d4d519dL
    private const val PRIME64_5 = 0x27D4EB2F165667C5L
    private const val STRIPE = 64
    private const val STRIPES_OF_A_BLOCK = 16

    private val secret: ByteBuffer =
        ByteBuffer.wrap(
                ("b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f" +
                        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c" +
                        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8" +
                        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364" +
                        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e" +
                        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e")
                    .chunked(2)
                    .map { it.toInt(16).toByte() }
                    .toByteArray()
            )
            .order(ByteOrder.LITTLE_ENDIAN)

    /** The secret's longs at multiples of 8, which long inputs need all the time. */
    private val words = LongArray(secret.capacity() / 8) { secret.getLong(8 * it) }

    /** The hash of `length` bytes from `begin` on. */
    fun hash(data: ByteArray, begin: Int = 0, length: Int = data.size - begin): Long {
        val input = ByteBuffer.wrap(data, begin, length).slice().order(ByteOrder.LITTLE_ENDIAN)
        return when {
            length == 0 -> mixed64(secret.getLong(56) xor secret.getLong(64))
            length <= 3 -> upTo3(input, length)
            length <= 8 -> upTo8(input, length)
            length <= 16 -> upTo16(input, length)
            length <= 128 -> upTo128(input, length)
            length <= 240 -> upTo240(input, length)
            else -> long(input, length)
        }
    }

    /** 16 hexadecimal digits, as `checksums.json` has them. */
    fun hex(hash: Long): String = java.lang.Long.toHexString(hash).padStart(16, '0')

    private fun upTo3(input: ByteBuffer, length: Int): Long {
        fun at(i: Int) = input.get(i).toLong() and 0xff
        val combined =
            (at(0) shl 16) or (at(length shr 1) shl 24) or at(length - 1) or (length.toLong() shl 8)
        return mixed64(combined xor unsigned(secret.getInt(0) xor secret.getInt(4)))
    }

    private fun upTo8(input: ByteBuffer, length: Int): Long {
        val joined = unsigned(input.getInt(length - 4)) + (unsigned(input.getInt(0)) shl 32)
        var h = joined xor secret.getLong(8) xor secret.getLong(16)
        h = h xor h.rotateLeft(49) xor h.rotateLeft(24)
        h *= RRMXMX
        h = h xor ((h ushr 35) + length)
        h *= RRMXMX
        return h xor (h ushr 28)
    }

    private fun upTo16(input: ByteBuffer, length: Int): Long {
        val low = input.getLong(0) xor secret.getLong(24) xor secret.getLong(32)
        val high = input.getLong(length - 8) xor secret.getLong(40) xor secret.getLong(48)
        return mixed(length + java.lang.Long.reverseBytes(low) + high + folded(low, high))
    }

    private fun upTo128(input: ByteBuffer, length: Int): Long {
        var sum = length * PRIME64_1
        for (i in (length - 1) / 32 downTo 0) {
            sum += mix16(input, 16 * i, 32 * i)
            sum += mix16(input, length - 16 * (i + 1), 32 * i + 16)
        }
        return mixed(sum)
    }

    private fun upTo240(input: ByteBuffer, length: Int): Long {
        var sum = length * PRIME64_1
        for (i in 0 until 8) sum += mix16(input, 16 * i, 16 * i)
        sum = mixed(sum)
        for (i in 8 until length / 16) sum += mix16(input, 16 * i, 16 * (i - 8) + 3)
        return mixed(sum + mix16(input, length - 16, 136 - 17))
    }

    private fun long(input: ByteBuffer, length: Int): Long {
        val sums =
            longArrayOf(
                PRIME32_3,
                PRIME64_1,
                PRIME64_2,
                PRIME64_3,
                PRIME64_4,
                PRIME32_2,
                PRIME64_5,
                PRIME32_1,
            )
        val stripes = (length - 1) / STRIPE
        for (n in 0 until stripes) {
            val within = n % STRIPES_OF_A_BLOCK
            for (i in 0 until 8) {
                val value = input.getLong(n * STRIPE + 8 * i)
                val keyed = value xor words[within + i]
                sums[i xor 1] += value
                sums[i] += (keyed and 0xffffffffL) * (keyed ushr 32)
            }
            if (within == STRIPES_OF_A_BLOCK - 1) scramble(sums)
        }
        for (i in 0 until 8) {
            val value = input.getLong(length - STRIPE + 8 * i)
            val keyed = value xor secret.getLong(121 + 8 * i)
            sums[i xor 1] += value
            sums[i] += (keyed and 0xffffffffL) * (keyed ushr 32)
        }
        var merged = length * PRIME64_1
        for (i in 0 until 4) {
            merged +=
                folded(
                    sums[2 * i] xor secret.getLong(11 + 16 * i),
                    sums[2 * i + 1] xor secret.getLong(19 + 16 * i),
                )
        }
        return mixed(merged)
    }

    private fun scramble(sums: LongArray) {
        for (i in 0 until 8) {
            sums[i] = (sums[i] xor (sums[i] ushr 47) xor words[16 + i]) * PRIME32_1
        }
    }

    private fun mix16(input: ByteBuffer, at: Int, key: Int): Long =
        folded(
            input.getLong(at) xor secret.getLong(key),
            input.getLong(at + 8) xor secret.getLong(key + 8),
        )

    /**
     * Both halves of a 128-bit product, one over the other. `Math.multiplyHigh` is not on Android.
     */
    private fun folded(a: Long, b: Long): Long {
        val aLow = a and 0xffffffffL
        val aHigh = a ushr 32
        val bLow = b and 0xffffffffL
        val bHigh = b ushr 32
        val middle = aHigh * bLow + (aLow * bLow ushr 32)
        val cross = aLow * bHigh + (middle and 0xffffffffL)
        return (aHigh * bHigh + (middle ushr 32) + (cross ushr 32)) xor (a * b)
    }

    private fun mixed(sum: Long): Long {
        val h = (sum xor (sum ushr 37)) * 0x165667919E3779F9L
        return h xor (h ushr 32)
    }

    private fun mixed64(sum: Long): Long {
        var h = (sum xor (sum ushr 33)) * PRIME64_2
        h = (h xor (h ushr 29)) * PRIME64_3
        return h xor (h ushr 32)
    }

    private fun unsigned(value: Int): Long = value.toLong() and 0xffffffffL

    private const val RRMXMX = -0x604de39ae16720dbL
}

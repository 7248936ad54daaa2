package io.pleexport

/**
 * What the header of a blob says, checked; a rule that it breaks is named as in
 * docs/blob-format.md.
 *
 * @property firstRow of the file; 0 but in shards.
 * @property numRows of the file, `numRowsTotal` of all shards together.
 * @property rowAliases by token id, the row that it selects.
 * @property runs by table.
 */
internal class BlobHeader(
    val firstRow: Long,
    val numRows: Long,
    val numRowsTotal: Long,
    val rowStride: Int,
    val numChunks: Long,
    val segments: List<Segment>,
    val rowAliases: Map<Long, Long>,
    val runs: Map<String, Run>,
    val sourceDigest: String,
)

/**
 * Reads the header of a blob.
 *
 * @throws BlobError it breaks a rule.
 * @throws CheckFailed it does not match its checksum.
 */
internal fun readHeader(file: SafetensorsFile): BlobHeader = BlobHeaderReader(file).read()

private const val FORMAT = "pleexport-blob"
private const val VERSION = "2"
private const val ROWS = "rows"
private const val CHUNK_CHECKSUMS = "checksums"
private const val SEGMENT_ALIGNMENT = 4
private const val ROW_ALIGNMENT = 64
private const val MINIMUM_PAGE_SIZE = 16_384
private const val LARGEST_ROW = 1L shl 30
private const val DAMAGED = "copy the bundle again, or rebuild it"
private const val NEWER = "install a newer pleexport"
private val METADATA =
    setOf(
        "format",
        "version",
        "page_size",
        "first_row",
        "num_rows_total",
        "row_aliases",
        "segments",
        "source_digest",
    )

/** In the order of the file: dtype and number of dimensions. */
private val TENSORS =
    mapOf(
        HEADER_CHECKSUM to ("uint64" to 1),
        ROWS to ("uint8" to 2),
        CHUNK_CHECKSUMS to ("uint64" to 1),
    )

private class BlobHeaderReader(private val file: SafetensorsFile) {
    fun read(): BlobHeader {
        if (file.metadata["format"] != FORMAT) {
            throw broken("is a safetensors file, but not a blob (B-02)")
        }
        // Before the version: a damaged one must not look like a newer one.
        if (headerIsDamaged(file)) {
            throw CheckFailed(
                "`${file.file}` is damaged: its header does not match its checksum (B-11)",
                DAMAGED,
            )
        }
        checkVersion()
        checkNames()
        val (numRows, stride) = checkTensors()
        val (firstRow, total) = readRange(numRows)
        val segments = readSegments()
        checkPlaces(segments, stride)
        return BlobHeader(
            firstRow = firstRow,
            numRows = numRows,
            numRowsTotal = total,
            rowStride = stride.toInt(),
            numChunks = file.entry(CHUNK_CHECKSUMS).shape[0],
            segments = segments,
            rowAliases = readAliases(total),
            runs = segments.groupBy { it.table }.mapValues { (table, own) -> planRun(table, own) },
            sourceDigest = file.metadata.getValue("source_digest"),
        )
    }

    private fun broken(what: String, hint: String = DAMAGED) =
        BlobError("`${file.file}`: $what", hint)

    private fun checkVersion() {
        val version = file.metadata["version"]
        if (version != VERSION) {
            throw broken(
                "has blob version ${quoted(version)}; this reader knows $VERSION (B-03)",
                if (version == "1") "build the bundle again from its checkpoint" else NEWER,
            )
        }
    }

    private fun checkNames() {
        val unknown =
            (file.metadata.keys - METADATA).sorted() + (file.entries.keys - TENSORS.keys).sorted()
        if (unknown.isNotEmpty()) {
            throw broken("has `${unknown[0]}`, which this reader does not know (B-04)", NEWER)
        }
        (METADATA - file.metadata.keys).minOrNull()?.let {
            throw broken("lacks the metadata `$it` (B-05)")
        }
    }

    private fun checkTensors(): Pair<Long, Long> {
        for ((name, kind) in TENSORS) {
            val entry = file.entries[name]
            if (entry == null || entry.dtype to entry.shape.size != kind) {
                throw broken("needs tensor `$name` of dtype ${kind.first} (B-01)")
            }
        }
        val inOrder = file.entries.values.sortedBy { it.offset }.map { it.name }
        if (file.entry(HEADER_CHECKSUM).shape != listOf(1L) || inOrder != TENSORS.keys.toList()) {
            throw broken("does not begin with one `$HEADER_CHECKSUM` and its rows (B-01)")
        }
        val rows = file.entry(ROWS)
        val (numRows, stride) = rows.shape
        if (numRows == 0L || stride == 0L || stride % ROW_ALIGNMENT != 0L) {
            throw broken("has $numRows rows of $stride bytes (B-01)")
        }
        if (stride > LARGEST_ROW) {
            throw broken("has rows of $stride bytes; this reader maps up to $LARGEST_ROW at once")
        }
        val pageSize = integer("page_size")
        if (pageSize < MINIMUM_PAGE_SIZE || rows.offset % pageSize != 0L) {
            throw broken(
                "has rows at byte ${rows.offset}, which is not a multiple of a page size of at " +
                    "least $MINIMUM_PAGE_SIZE (B-07)"
            )
        }
        val chunks = file.entry(CHUNK_CHECKSUMS).shape[0]
        if (chunks != groups(rows.bytes, CHUNK_BYTES.toLong())) {
            throw broken("has $chunks checksums, not one for each chunk (B-10)")
        }
        return numRows to stride
    }

    /** The first row, and how many rows all shards have together. */
    private fun readRange(numRows: Long): Pair<Long, Long> {
        val first = integer("first_row")
        val total = integer("num_rows_total")
        if (first > total - numRows) {
            throw broken("says that it has $numRows rows from $first of $total (B-12)")
        }
        return first to total
    }

    private fun json(name: String): Any? =
        try {
            parseJson(file.metadata.getValue(name))
        } catch (err: MalformedJson) {
            throw broken("has metadata `$name` that is not valid JSON (B-05)")
        }

    private fun integer(name: String): Long =
        (json(name) as? Long)?.takeIf { it >= 0 }
            ?: throw broken("has metadata `$name` that is not a number of rows or bytes (B-05)")

    private fun readSegments(): List<Segment> {
        val segments =
            try {
                list(::segment)(json("segments"), "$")
            } catch (err: MalformedJson) {
                throw broken("has a malformed segment: ${err.message} (B-06)")
            }
        if (segments.isEmpty()) throw broken("has no segments (B-06)")
        if (segments.distinctBy { it.name }.size != segments.size) {
            throw broken("has two segments of one name (B-06)")
        }
        for (segment in segments) {
            problem(segment)?.let { throw broken("segment `${segment.name}` $it (B-06)") }
        }
        return segments
    }

    /** What a segment says of itself that cannot be. */
    private fun problem(segment: Segment): String? =
        when {
            segment.dtype !in BITS ->
                "has dtype `${segment.dtype}`, which this reader does not know"
            !(Math.abs(segment.multiplier) <= Float.MAX_VALUE) ->
                "has multiplier ${segment.multiplier}"
            scaling(segment) != null -> scaling(segment)
            segment.scaleDtype !in listOf(null, "fp16", "fp32") ->
                "has scales of dtype `${segment.scaleDtype}`, which this reader does not know"
            (segment.groupSize ?: 1) > segment.width ->
                "has groups of ${segment.groupSize} of its ${segment.width} elements"
            else -> null
        }

    /** What contradicts the dtype in what a segment says of its scales. */
    private fun scaling(segment: Segment): String? {
        val fields =
            listOf(
                "group_size" to segment.groupSize,
                "scale_dtype" to segment.scaleDtype,
                "scale_offset" to segment.scaleOffset,
            )
        val coded = segment.dtype in CODED
        val (field, _) = fields.firstOrNull { (it.second != null) != coded } ?: return null
        return "of dtype `${segment.dtype}` " +
            if (coded) "needs scales, but `$field` is null"
            else "has no scales, but `$field` is not null"
    }

    private fun checkPlaces(segments: List<Segment>, stride: Long) {
        var position = 0L
        for (segment in segments) {
            val where = "segment `${segment.name}`"
            val (codesEnd, end) =
                try {
                    Math.addExact(segment.offset, segment.codeBytes) to segment.end
                } catch (err: ArithmeticException) {
                    throw broken("$where ends beyond any row (B-08)")
                }
            val scalesBegin = segment.scaleOffset ?: codesEnd
            val alignment = segment.scaleDtype?.let { BITS.getValue(it) / 8 } ?: 1
            checkAlignment("$where begins", segment.offset, SEGMENT_ALIGNMENT)
            checkAlignment("$where has scales", scalesBegin, alignment)
            if (segment.offset < position || scalesBegin < codesEnd) {
                throw broken("$where overlaps what lies before it (B-08)")
            }
            if (end > stride - CHECKSUM_BYTES) {
                throw broken(
                    "$where ends at byte $end of rows of $stride, which end with a checksum (B-08)"
                )
            }
            position = end
        }
    }

    private fun checkAlignment(what: String, place: Long, unit: Int) {
        if (place % unit != 0L) {
            throw broken("$what at byte $place, which is no multiple of $unit (B-08)")
        }
    }

    private fun planRun(table: String, own: List<Segment>): Run {
        val first = own[0]
        val perLayer = first.layer != null
        val pitch = if (own.size > 1) own[1].offset - first.offset else 0
        own.forEachIndexed { i, segment ->
            val expected =
                first.copy(
                    name = segment.name,
                    layer = if (perLayer) i.toLong() else null,
                    offset = first.offset + i * pitch,
                    scaleOffset = first.scaleOffset?.let { it + i * pitch },
                )
            if (segment != expected || (own.size > 1 && !perLayer)) {
                throw broken(
                    "segment `${segment.name}` breaks the even order of table `$table` (B-08)"
                )
            }
        }
        return Run(own)
    }

    private fun readAliases(numRows: Long): Map<Long, Long> {
        val pairs =
            try {
                list(list(::long))(json("row_aliases"), "$").map { pair ->
                    if (pair.size != 2)
                        throw MalformedJson("Expected `array` of length 2, got ${pair.size}")
                    pair[0] to pair[1]
                }
            } catch (err: MalformedJson) {
                throw broken("has malformed row aliases: ${err.message} (B-09)")
            }
        for ((id, row) in pairs) {
            if (id !in 0 until numRows || row !in 0 until numRows) {
                throw broken("has row alias $id -> $row outside its rows (B-09)")
            }
        }
        val aliases = pairs.toMap()
        if (aliases.size != pairs.size || aliases.values.any { it in aliases }) {
            throw broken("has row aliases that can be read in two ways (B-09)")
        }
        return aliases
    }
}

private fun segment(value: Any?, path: String): Segment =
    fieldsOf(value, path) {
        Segment(
            name = required("name", ::string),
            table = required("table", ::string),
            layer = required("layer", orNull(atLeast(0))),
            offset = required("offset", atLeast(0)),
            width = required("width", atLeast(1)),
            dtype = required("dtype", ::string),
            groupSize = required("group_size", orNull(atLeast(1))),
            scaleDtype = required("scale_dtype", orNull(::string)),
            scaleOffset = required("scale_offset", orNull(atLeast(0))),
            multiplier = required("multiplier", ::number),
        )
    }

internal fun atLeast(least: Long): (Any?, String) -> Long = { value, path ->
    long(value, path).also {
        if (it < least) throw MalformedJson("Expected `int` >= $least - at `$path`")
    }
}

/** A text or a missing one as the Python library writes it. */
internal fun quoted(text: String?): String = text?.let { "'$it'" } ?: "None"

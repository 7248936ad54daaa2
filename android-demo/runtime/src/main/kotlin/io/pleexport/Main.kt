package io.pleexport

import java.io.File
import java.io.FileDescriptor
import java.io.FileOutputStream
import java.io.IOException
import java.io.PrintStream
import kotlin.system.exitProcess
import kotlinx.coroutines.runBlocking

/** The command line of the jar. Data goes to standard output, everything else to standard error. */
object Main {
    private const val USAGE =
        """usage: java -jar pleexport-runtime.jar COMMAND BUNDLE [OPTIONS]

  logits BUNDLE --ids 1,2,3 --out FILE.npy     logits of all positions, float32 [T, vocab]
  run BUNDLE --prompt TEXT --max-new-tokens N  continue a text; --ids 1,2,3 continues token ids
      [--temperature X] [--top-k N] [--top-p X] [--min-p X] [--repetition-penalty X] [--greedy]
      [--seed N] [--stop TEXT] [--draft lookup] [--no-chat] [--stats]
  bench BUNDLE --prompt-tokens 128,512 --decode-tokens 64 [--repeat 3] [--json]
  encode BUNDLE --text TEXT                    token ids of a text
  decode BUNDLE --ids 1,2,3                    the text of token ids
  verify BUNDLE                                compare every file with its checksums

options of all commands: --threads N, --spin, --no-spin, --no-verify"""

    @JvmStatic
    fun main(arguments: Array<String>) {
        exitProcess(run(arguments.toList()))
    }

    /** The exit code: 0, or 2 after one sentence on standard error. */
    internal fun run(arguments: List<String>): Int =
        try {
            when (arguments.firstOrNull()) {
                "logits" -> logits(Options(arguments.drop(1), setOf("ids", "out")))
                "run" ->
                    generate(Options(arguments.drop(1), RUN, setOf("greedy", "stats", "no-chat")))
                "bench" ->
                    bench(
                        Options(
                            arguments.drop(1),
                            setOf("prompt-tokens", "decode-tokens", "repeat"),
                            setOf("json"),
                        )
                    )
                "encode" -> encode(Options(arguments.drop(1), setOf("text")))
                "decode" -> decode(Options(arguments.drop(1), setOf("ids")))
                "verify" -> verify(Options(arguments.drop(1), emptySet()))
                "-h",
                "--help" -> println(USAGE)
                else ->
                    throw InputError(
                        "`${arguments.firstOrNull() ?: ""}` is no command",
                        "`--help` lists all commands",
                    )
            }
            0
        } catch (err: PleexportError) {
            // Names and texts of files are not trusted: what steers a terminal is not printed.
        System.err.println("error: ${plain(err.message)}\n\nhint: ${plain(err.hint)}")
            2
        } catch (err: IOException) {
            System.err.println("error: ${err.message}")
            2
        }

    private fun logits(options: Options) {
        val ids = options.ids("ids") ?: throw options.missing("ids")
        val out = File(options["out"] ?: throw options.missing("out"))
        options.open().use { runner ->
            NpyWriter(out, ids.size, runner.vocabSize).use { file ->
                runner.logits(ids, file::write)
            }
        }
    }

    private fun generate(options: Options) {
        val config =
            GenerationConfig(
                temperature = options.number("temperature", String::toDoubleOrNull),
                topK = options.int("top-k"),
                topP = options.number("top-p", String::toDoubleOrNull),
                minP = options.number("min-p", String::toDoubleOrNull),
                repetitionPenalty = options.number("repetition-penalty", String::toDoubleOrNull),
                maxNewTokens = options.int("max-new-tokens"),
            )
        val wanted =
            GenerationOptions(
                config = config,
                greedy = options.has("greedy"),
                seed = options.number("seed", String::toLongOrNull),
                stop = listOfNotNull(options["stop"]),
                draft = options["draft"]?.let(::drafterOf),
            )
        options.open().use { runner ->
            val given = options.ids("ids")
            val asChat = given == null && !options.has("no-chat") && runner.hasChatTemplate
            val prompt =
                options["prompt"] ?: if (given == null) throw options.missing("prompt") else ""
            val ids =
                given
                    ?: if (asChat) runner.encodeChat(listOf(Message("user", prompt)))
                    else runner.encode(prompt)
            val filter = if (asChat) runner.tokenizer?.let { ThoughtFilter(it, ids) } else null
            val out = PrintStream(FileOutputStream(FileDescriptor.out), true, "UTF-8")
            runBlocking {
                runner.generate(ids, wanted).collect { token ->
                    val text = if (runner.tokenizer == null) "${token.id} " else token.text
                    out.print(filter?.push(token) ?: text)
                    out.flush()
                }
            }
            out.println(filter?.flush() ?: "")
            if (options.has("stats")) System.err.println(describe(runner.stats))
        }
    }

    private fun bench(options: Options) {
        val lengths = options.ids("prompt-tokens") ?: intArrayOf(128, 512)
        val result =
            bench(
                options::open,
                promptTokens = lengths.toList(),
                decodeTokens = options.int("decode-tokens") ?: 64,
                repeat = options.int("repeat") ?: 3,
            )
        if (options.has("json")) println(result.json()) else println(result.describe())
    }

    private fun encode(options: Options) =
        options.open().use { runner ->
            println(
                runner.encode(options["text"] ?: throw options.missing("text")).joinToString(",")
            )
        }

    private fun decode(options: Options) =
        options.open().use { runner ->
            val ids = options.ids("ids") ?: throw options.missing("ids")
            val tokenizer =
                runner.tokenizer
                    ?: throw InputError(
                        "this bundle has no tokenizer",
                        "it takes and gives token ids only",
                    )
            PrintStream(FileOutputStream(FileDescriptor.out), true, "UTF-8")
                .println(tokenizer.decode(ids))
        }

    private fun verify(options: Options) {
        options.bundle().verify()
        println("Files are intact.")
    }

    private fun plain(text: String) = text.map { if (it.isISOControl()) '?' else it }.joinToString("")

    private fun describe(stats: Stats): String =
        listOfNotNull(
                "finished: ${stats.finishReason?.label ?: ""}",
                "prefill: ${stats.promptTokens} tokens, ${stats.prefillTokensPerSecond.toInt()} tokens/s",
                "decode: ${stats.generatedTokens} tokens, ${stats.decodeTokensPerSecond.toInt()} tokens/s",
                drafts(stats).takeIf { stats.draftedTokens > 0 },
                "rows: ${stats.rows}",
            )
            .joinToString("\n")

    private fun drafts(stats: Stats): String =
        stats.run { "drafts: $acceptedTokens of $draftedTokens tokens accepted, $decodeCalls calls" }

    private val RUN =
        setOf(
            "prompt",
            "ids",
            "max-new-tokens",
            "temperature",
            "top-k",
            "top-p",
            "min-p",
            "repetition-penalty",
            "seed",
            "stop",
            "draft",
        )
}

/**
 * What follows a command: a bundle's folder, and options.
 *
 * @param valued names of the options that this command has, and that have a value.
 * @param flags names of those without one.
 */
internal class Options(
    arguments: List<String>,
    valued: Set<String>,
    flags: Set<String> = emptySet(),
) {
    private val values = HashMap<String, String>()
    private val set = HashSet<String>()
    private val folders = ArrayList<String>()

    init {
        val rest = ArrayDeque(arguments)
        while (rest.isNotEmpty()) {
            val word = rest.removeFirst()
            val name = word.removePrefix("--").substringBefore('=')
            when {
                !word.startsWith("--") -> folders += word
                name in flags + FLAGS -> set += name
                name !in valued + VALUED ->
                    throw InputError("`--$name` is no option of this command", "`--help` lists all")
                '=' in word -> values[name] = word.substringAfter('=')
                else ->
                    values[name] =
                        rest.removeFirstOrNull()
                            ?: throw InputError(
                                "`--$name` has no value",
                                "`--help` shows an example",
                            )
            }
        }
    }

    operator fun get(name: String): String? = values[name]

    fun has(flag: String): Boolean = flag in set

    fun missing(name: String) = InputError("`--$name` is missing", "`--help` shows an example")

    /** Numbers separated by commas; null where the option is not given. */
    fun ids(name: String): IntArray? =
        this[name]?.let { text ->
            try {
                text.split(",").map { it.trim().toInt() }.toIntArray()
            } catch (err: NumberFormatException) {
                throw InputError(
                    "`$text` is not a list of numbers separated by commas",
                    "e.g. `2,651,9456`",
                    err,
                )
            }
        }

    fun int(name: String): Int? = number(name, String::toIntOrNull)

    fun <T : Any> number(name: String, convert: (String) -> T?): T? =
        this[name]?.let {
            convert(it)
                ?: throw InputError(
                    "`--$name` is `$it`, which is no such number",
                    "e.g. `--$name 1`",
                )
        }

    /** The bundle. */
    fun bundle(): Bundle {
        val folder =
            folders.singleOrNull()
                ?: throw InputError("a command takes one bundle", "`--help` shows an example")
        return Bundle(File(folder), verify = !has("no-verify"))
    }

    /** A runner on the bundle. */
    fun open(): Runner {
        val spin = if (has("spin")) true else if (has("no-spin")) false else null
        return Runner(bundle(), int("threads") ?: 0, spin)
    }

    private companion object {
        val VALUED = setOf("threads")
        val FLAGS = setOf("spin", "no-spin", "no-verify")
    }
}

package io.pleexport

import java.io.File
import java.nio.file.Files
import java.nio.file.Path
import java.security.KeyFactory
import java.security.Signature
import java.security.spec.X509EncodedKeySpec
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertFalse
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir

class PacksTest {
    @TempDir lateinit var folder: Path

    private val into
        get() = folder.resolve("made/bundle").toFile()

    /** The files of a bundle, every second one in another folder. */
    private fun packs(): List<File> {
        val packs = (0..1).map { folder.resolve("pack-$it").toFile() }
        File("../../conformance/gemma4-int4").listFiles()!!.sorted().forEachIndexed { i, file ->
            file.copyTo(File(packs[i % 2], file.name), overwrite = true)
        }
        return packs
    }

    @Test
    fun `files of packs become a bundle, and nothing is copied`() {
        val packs = packs()
        Packs.join(packs.reversed(), into)
        Bundle(into).verify()
        val names = packs.flatMap { it.list()!!.toList() }.sorted()
        assertEquals(names, into.list()!!.sorted())
        assertEquals(listOf("bundle"), into.parentFile.list()!!.toList())
        for (pack in packs) for (file in pack.listFiles()!!) {
            assertTrue(Files.isSameFile(file.toPath(), File(into, file.name).toPath()))
        }
        assertEquals(
            "`$into` exists already",
            refusal<BundleError> { Packs.join(packs, into) },
        )
    }

    @Test
    fun `files are copied to another disk`() {
        val other = File("/dev/shm")
        if (!other.canWrite() || sameDisk(other)) return // a system with one disk
        val place = Files.createTempDirectory(other.toPath(), "packs").toFile()
        try {
            val packs = packs()
            Packs.join(packs, File(place, "bundle"))
            Bundle(File(place, "bundle")).verify()
            packs.forEach { it.deleteRecursively() }
            Bundle(File(place, "bundle")).verify()
        } finally {
            place.deleteRecursively()
        }
    }

    private fun sameDisk(other: File) =
        Files.getFileStore(other.toPath()) == Files.getFileStore(folder)

    /** As docs/packaging.md tells apps to. */
    @Test
    fun `the signature of an index is confirmed by the platform`() {
        val signed = Cases.of("signature")
        val index = File(signed, "index.json").readBytes()
        val key =
            KeyFactory.getInstance("EC")
                .generatePublic(X509EncodedKeySpec(File(signed, "public.der").readBytes()))
        fun confirmed(data: ByteArray): Boolean =
            Signature.getInstance("SHA256withECDSA").run {
                initVerify(key)
                update(data)
                verify(File(signed, "index.json.sig").readBytes())
            }
        assertTrue(confirmed(index))
        assertFalse(confirmed(index + 10))
    }

    @Test
    fun `what is missing or cut is told, and leaves nothing`() {
        val packs = packs()
        val blob = packs.map { File(it, BLOB) }.first(File::isFile)
        blob.appendBytes(ByteArray(1))
        assertTrue("the manifest says" in refusal<CheckFailed> { Packs.join(packs, into) })
        blob.delete()
        val missing = "no pack holds `$BLOB`, which the bundle needs"
        assertEquals(missing, refusal<BundleError> { Packs.join(packs, into) })
        assertEquals(
            "no pack holds `manifest.json`, which the bundle needs",
            refusal<BundleError> { Packs.join(emptyList(), into) },
        )
        assertFalse(into.exists())
        assertEquals(0, into.parentFile.list()!!.size)
        val file = folder.resolve("file").toFile().also { it.writeText("") }
        val inside = File(file, "bundle")
        assertTrue("cannot be written" in refusal<BundleError> { Packs.join(packs, inside) })
        flip(packs().map { File(it, MANIFEST) }.first(File::isFile), 9)
        assertTrue("manifest.json` is damaged" in refusal<CheckFailed> { Packs.join(packs, into) })
    }
}

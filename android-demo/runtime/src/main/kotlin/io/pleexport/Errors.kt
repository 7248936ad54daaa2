package io.pleexport

/**
 * Base of all errors that are shown to users as one sentence; the words are those of the Python
 * library.
 *
 * @param message what is wrong, where, and what was expected.
 * @param hint what to do about it.
 */
sealed class PleexportError(override val message: String, val hint: String, cause: Throwable?) :
    Exception(message, cause)

/** The folder is not a bundle, or not one that this version reads. */
class BundleError(message: String, hint: String, cause: Throwable? = null) :
    PleexportError(message, hint, cause)

/** The blob breaks a rule of docs/blob-format.md. */
class BlobError(message: String, hint: String, cause: Throwable? = null) :
    PleexportError(message, hint, cause)

/** A tokenizer's files are malformed, or have parts that are not known here. */
class TokenizerError(message: String, hint: String, cause: Throwable? = null) :
    PleexportError(message, hint, cause)

/** A prompt, id, text or option that cannot be used. */
class InputError(message: String, hint: String, cause: Throwable? = null) :
    PleexportError(message, hint, cause)

/** A file does not match its checksum or its size. */
class CheckFailed(message: String, hint: String, cause: Throwable? = null) :
    PleexportError(message, hint, cause)

/** A bundle cannot be brought onto this device: the connection, the storage, or what is served. */
class DeliveryError(message: String, hint: String, cause: Throwable? = null) :
    PleexportError(message, hint, cause)

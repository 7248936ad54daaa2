package io.pleexport.chat

import java.io.InputStream

/** What this device is and has: the app asks Android, and tests say it. */
interface Device {
    /** Names of the kinds of code that it runs, the best one first. */
    val abis: List<String>

    /** Bytes of memory that can be had without ending other apps that are in use. */
    fun availableBytes(): Long
}

/** Bundles that came with the app. */
interface Shipped {
    fun names(): List<String>

    /** Names of a bundle's files. */
    fun files(name: String): List<String>

    fun open(name: String, file: String): InputStream
}

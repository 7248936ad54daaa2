package io.pleexport.app

import android.app.Application

/** Owns what outlives a screen. */
class ChatApplication : Application()

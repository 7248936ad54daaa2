package io.pleexport.app

import android.app.Activity
import android.os.Bundle
import android.widget.TextView
import io.pleexport.Runner
import java.io.File
import kotlin.concurrent.thread
import kotlinx.coroutines.runBlocking

class ChatActivity : Activity() {
    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val view = TextView(this)
        setContentView(view)
        thread {
            Runner(File(filesDir, "bundle")).use { runner ->
                runBlocking {
                    runner.generate("And God said").collect { token ->
                        view.post { view.append(token.text) }
                    }
                }
            }
        }
    }
}

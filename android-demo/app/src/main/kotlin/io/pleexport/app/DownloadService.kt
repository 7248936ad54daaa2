package io.pleexport.app

import android.app.Notification
import android.app.NotificationChannel
import android.app.NotificationManager
import android.app.PendingIntent
import android.app.Service
import android.content.Intent
import android.os.IBinder
import android.os.PowerManager
import io.pleexport.chat.Chat
import io.pleexport.chat.Screen
import kotlinx.coroutines.cancel
import kotlinx.coroutines.launch

private const val CHANNEL = "downloads"
private const val PROGRESS_ID = 1
private const val END_ID = 2
private const val STEPS = 1000
private const val CANCEL = "io.pleexport.app.CANCEL"

/** Longer than any download; the lock is given back with the service. */
private const val MOST_AWAKE_MILLIS = 24 * 3_600_000L

/**
 * Keeps the process and the processor at work while a bundle is downloaded and the app is not seen.
 * It shows how far the download has come and ends with it; the download itself is the chat's.
 */
class DownloadService : Service() {
    private val chat: Chat
        get() = (application as ChatApplication).chat

    private val manager: NotificationManager
        get() = getSystemService(NotificationManager::class.java)

    private val scope = mainScope()
    private lateinit var awake: PowerManager.WakeLock

    override fun onBind(intent: Intent?): IBinder? = null

    override fun onCreate() {
        super.onCreate()
        isRunning = true
        val channel = NotificationChannel(CHANNEL, "Downloads", NotificationManager.IMPORTANCE_LOW)
        manager.createNotificationChannel(channel)
        manager.cancel(END_ID)
        try {
            startForeground(PROGRESS_ID, notification("Download").build())
        } catch (err: IllegalStateException) {
            // The hours that Android 15 grants a day are over: it goes on while it is seen.
        }
        val power = getSystemService(PowerManager::class.java)
        awake = power.newWakeLock(PowerManager.PARTIAL_WAKE_LOCK, "pleexport:download")
        awake.acquire(MOST_AWAKE_MILLIS)
        scope.launch { chat.screen.collect(::show) }
    }

    override fun onStartCommand(intent: Intent?, flags: Int, startId: Int): Int {
        if (intent?.action == CANCEL) chat.stop()
        // Who was ended begins the download again, and it goes on where it was.
        return START_NOT_STICKY
    }

    /** Android 15 grants some hours a day. What has come is kept. */
    override fun onTimeout(startId: Int, fgsType: Int) = chat.stop()

    override fun onDestroy() {
        isRunning = false
        scope.cancel()
        awake.release()
        super.onDestroy()
    }

    private fun show(screen: Screen) {
        if (screen is Screen.Bringing && screen.isDownload) {
            manager.notify(PROGRESS_ID, progress(screen))
            return
        }
        // What has come is opened next; how that ends is told.
        val end = ended(screen) ?: return
        stopForeground(STOP_FOREGROUND_REMOVE)
        if (!(application as ChatApplication).isSeen) manager.notify(END_ID, end)
        stopSelf()
    }

    private fun progress(screen: Screen.Bringing): Notification {
        val cancel = Intent(this, DownloadService::class.java).setAction(CANCEL)
        val press = PendingIntent.getService(this, 0, cancel, PendingIntent.FLAG_IMMUTABLE)
        return notification(screen.text)
            .setProgress(STEPS, screen.thousandths, screen.thousandths == 0)
            .setOngoing(true)
            .setCategory(Notification.CATEGORY_PROGRESS)
            .addAction(Notification.Action.Builder(null, "Cancel", press).build())
            .build()
    }

    private fun ended(screen: Screen): Notification? {
        val end =
            when (screen) {
                is Screen.Talking -> notification("`${screen.name}` is here")
                is Screen.Choosing -> {
                    val why = screen.notice?.text
                    notification("The download has stopped", why)
                        .setStyle(Notification.BigTextStyle().bigText(why))
                }
                else -> return null
            }
        return end.setAutoCancel(true).build()
    }

    private fun notification(title: String, text: String? = null): Notification.Builder {
        val app = Intent(this, ChatActivity::class.java)
        return Notification.Builder(this, CHANNEL)
            .setSmallIcon(android.R.drawable.stat_sys_download)
            .setContentTitle(title)
            .setContentText(text)
            .setOnlyAlertOnce(true)
            .setContentIntent(PendingIntent.getActivity(this, 0, app, PendingIntent.FLAG_IMMUTABLE))
    }

    companion object {
        /** Whether there is one now; of the main thread. */
        internal var isRunning = false
            private set
    }
}

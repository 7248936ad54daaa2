// For Android Studio. ../apk/make_apk.py builds the same sources without Gradle, and reads what is in
// defaultConfig here.
plugins {
    id("com.android.application") version "8.13.2"
    id("org.jetbrains.kotlin.android") version "2.4.21"
}

android {
    namespace = "io.pleexport.app"
    compileSdk = 36

    defaultConfig {
        applicationId = "io.pleexport.app"
        minSdk = 26
        targetSdk = 36
        versionCode = 1
        versionName = "0.1.0"
        ndk { abiFilters += "arm64-v8a" }
    }

    // The app's own code that knows Android is in src/main, the rest of it in src/chat.
    sourceSets["main"].kotlin.srcDirs("src/chat/kotlin", "../runtime/src/main/kotlin")

    buildTypes {
        // Shrinking leaves ONNX Runtime's telemetry out.
        release {
            isMinifyEnabled = true
            proguardFiles(
                getDefaultProguardFile("proguard-android-optimize.txt"),
                "../runtime/consumer-rules.pro",
                "shrinking.pro",
            )
        }
    }

    // Graphs and rows are mapped by path, so the app copies a bundle out of its assets.
    androidResources { noCompress += listOf("safetensors", "onnx", "data") }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin { jvmToolchain(17) }

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0")
    implementation("com.google.code.gson:gson:2.13.1")
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-core:1.10.2")
    testImplementation("org.junit.jupiter:junit-jupiter:5.13.4")
    testRuntimeOnly("org.junit.platform:junit-platform-launcher:1.13.4")
}

tasks.withType<Test>().configureEach { useJUnitPlatform() }

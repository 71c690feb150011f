import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// One script and one style sheet with fixed names: `viewer.export` puts them into a file of their own.
export default defineConfig({
  plugins: [react()],
  base: "./",
  build: {
    outDir: "../page",
    emptyOutDir: true,
    license: { fileName: "licenses.md" },
    cssCodeSplit: false,
    assetsInlineLimit: 1_000_000,
    chunkSizeWarningLimit: 2_000,
    rollupOptions: {
      output: { entryFileNames: "viewer.js", assetFileNames: "viewer.[ext]", codeSplitting: false },
    },
  },
  server: { proxy: { "/api": process.env.LRL_API ?? "http://127.0.0.1:7860" } },
});

// One bucket of Cloudflare's R2 emulator behind its S3 endpoint, in memory, on 127.0.0.1. Ends on SIGTERM and SIGINT.
//   node server.mjs PORT BUCKET      with ACCESS_KEY_ID and SECRET_ACCESS_KEY in the environment

import { Miniflare } from "miniflare";

const [port, name] = process.argv.slice(2);
const { ACCESS_KEY_ID: accessKeyId, SECRET_ACCESS_KEY: secretAccessKey } = process.env;

const emulator = new Miniflare({
  host: "127.0.0.1",
  port: Number(port),
  cf: false, // else it asks Cloudflare where this machine is
  telemetry: { enabled: false },
  logRequests: false,
  workers: [
    {
      config: {
        name: "storage",
        compatibilityDate: "2026-01-01",
        manifest: {
          mainModule: "nothing.mjs",
          modulesRoot: "/",
          modules: {
            "nothing.mjs": {
              type: "esm",
              contents: "export default { fetch: () => new Response(null, { status: 404 }) }",
            },
          },
        },
        env: {
          BUCKET: { type: "r2", name, dev: { experimentalS3Credentials: { accessKeyId, secretAccessKey } } },
        },
      },
    },
  ],
});

for (const signal of ["SIGTERM", "SIGINT"]) {
  process.once(signal, () => emulator.dispose().finally(() => process.exit(0)));
}
await emulator.ready;

"""The tests of the storage, against servers that nobody here wrote: Ceph's radosgw and Cloudflare's R2 emulator."""

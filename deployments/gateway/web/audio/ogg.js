// Ogg pages with one Opus stream (RFC 3533, RFC 7845): enough to talk to the service, which sends whole pages.

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte << 24;
  for (let bit = 0; bit < 8; bit++) crc = crc & 0x80000000 ? (crc << 1) ^ 0x04c11db7 : crc << 1;
  return crc;
});

const HEADER_BYTES = 27;
const CRC_AT = 22;

/** CRC of a page, whose CRC field is taken as zero. */
function checksum(page) {
  let crc = 0;
  for (let at = 0; at < page.length; at++) {
    const byte = at >= CRC_AT && at < CRC_AT + 4 ? 0 : page[at];
    crc = (crc << 8) ^ CRC_TABLE[(crc >>> 24) ^ byte];
  }
  return crc >>> 0;
}

function isText(bytes, text) {
  return bytes.length >= text.length && [...text].every((letter, at) => bytes[at] === letter.charCodeAt(0));
}

function ascii(text) {
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
}

/** Writes one logical stream, one whole page per call. */
export class OggMuxer {
  #serial;
  #sequence = 0;

  constructor(serial) {
    this.#serial = serial;
  }

  /** The OpusHead and OpusTags pages of a mono stream; `preSkip` in samples at 48 kHz. */
  headers(preSkip, sampleRate) {
    const head = new Uint8Array(19);
    head.set(ascii("OpusHead"));
    const view = new DataView(head.buffer);
    head[8] = 1; // version
    head[9] = 1; // channels
    view.setUint16(10, preSkip, true);
    view.setUint32(12, sampleRate, true);
    const vendor = ascii("personaplex-web");
    const tags = new Uint8Array(16 + vendor.length);
    tags.set(ascii("OpusTags"));
    new DataView(tags.buffer).setUint32(8, vendor.length, true);
    tags.set(vendor, 12);
    return [this.#page([head], 0, 2), this.#page([tags], 0, 0)];
  }

  /** One page with all of `packets`; `granule` is the 48 kHz position after the last of them. */
  page(packets, granule) {
    return this.#page(packets, granule, 0);
  }

  #page(packets, granule, type) {
    const lacing = packets.flatMap(({ length }) => [...Array(Math.floor(length / 255)).fill(255), length % 255]);
    const bodyAt = HEADER_BYTES + lacing.length;
    const page = new Uint8Array(packets.reduce((size, { length }) => size + length, bodyAt));
    const view = new DataView(page.buffer);
    page.set(ascii("OggS"));
    page[5] = type;
    view.setBigInt64(6, BigInt(granule), true);
    view.setUint32(14, this.#serial, true);
    view.setUint32(18, this.#sequence++, true);
    page[26] = lacing.length;
    page.set(lacing, HEADER_BYTES);
    let at = bodyAt;
    for (const packet of packets) {
      page.set(packet, at);
      at += packet.length;
    }
    view.setUint32(CRC_AT, checksum(page), true);
    return page;
  }
}

/** Audio pages in `bytes`, which begin and end with a page: `{sequence, granule, packets}` each; headers are left
 * out. */
export function* audioPages(bytes) {
  for (let start = 0; start < bytes.length; ) {
    const page = bytes.subarray(start);
    const bodyAt = HEADER_BYTES + (page[26] ?? 0);
    if (!isText(page, "OggS") || page.length < bodyAt) throw new Error("The service sent audio that is not Ogg.");
    const lacing = page.subarray(HEADER_BYTES, bodyAt);
    const size = lacing.reduce((sum, lace) => sum + lace, bodyAt);
    if (page.length < size) throw new Error("The service sent part of an Ogg page.");
    const packets = [];
    let [begin, end] = [bodyAt, bodyAt];
    for (const lace of lacing) {
      end += lace;
      if (lace === 255) continue;
      packets.push(page.subarray(begin, end));
      begin = end;
    }
    const view = new DataView(page.buffer, page.byteOffset, size);
    const isHeader = packets.length === 1 && (isText(packets[0], "OpusHead") || isText(packets[0], "OpusTags"));
    if (!isHeader) {
      yield { sequence: view.getUint32(18, true), granule: Number(view.getBigInt64(6, true)), packets };
    }
    start += size;
  }
}

// Opus packets in one piece of bytes: each behind its length as two bytes, little end first.

export function pack(packets) {
  const bytes = new Uint8Array(packets.reduce((size, { length }) => size + 2 + length, 0));
  let at = 0;
  for (const packet of packets) {
    bytes[at] = packet.length & 255;
    bytes[at + 1] = packet.length >> 8;
    bytes.set(packet, at + 2);
    at += 2 + packet.length;
  }
  return bytes;
}

export function unpack(bytes) {
  const packets = [];
  for (let at = 0; at + 2 <= bytes.length; ) {
    const end = at + 2 + (bytes[at] | (bytes[at + 1] << 8));
    packets.push(bytes.subarray(at + 2, end));
    at = end;
  }
  return packets;
}

// Exponent bytes, gathered by the one invocation that stores them.
var<private> packed_scales: u32;

fn store_scale(row: u32, span: u32, bits: u32) {
    let exponent = select(bits >> 23u, 255u, bits > INFINITE);
    packed_scales = select(packed_scales, 0u, span % 4u == 0u) | (exponent << (8u * (span % 4u)));
    if span % 4u == 3u || span == SPANS - 1u {
        scales[row * ((SPANS + 3u) / 4u) + span / 4u] = packed_scales;
    }
}

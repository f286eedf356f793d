// proof: counts the binary16 that the device does not unpack exactly, from either half of a word. A NaN may have any
// bits. One invocation a binary16; no step of a layer.
fn differs(unpacked: f32, half: u32) -> bool {
    let bits = bitcast<u32>(unpacked);
    let wanted = bitcast<u32>(decode_f16(half));
    let nan = (wanted & 0x7fffffffu) > 0x7f800000u;
    return select(bits != wanted, (bits & 0x7fffffffu) <= 0x7f800000u, nan);
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) invocation: vec3<u32>) {
    let low = invocation.x;
    let high = 0xffffu - low;
    let pair = unpack2x16float(low | (high << 16u));
    if differs(pair.x, low) || differs(pair.y, high) {
        atomicAdd(&wrong, 1u);
    }
}

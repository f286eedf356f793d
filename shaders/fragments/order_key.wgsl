// A u32 that orders like the number; 0 stands below every number. -0 equals +0. Twin: numerics::order_key.
fn order_key(value: f32) -> u32 {
    var bits = bitcast<u32>(value);
    bits = select(bits, 0u, (bits & 0x7fffffffu) == 0u);
    return select(~bits, bits | 0x80000000u, bits < 0x80000000u);
}

fn from_order_key(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key ^ 0x80000000u, key >= 0x80000000u));
}

// Bits of the subnormal value / 2^64, which no device need represent; 0 if that is not subnormal.
fn subnormal_bits(value: f32) -> u32 {
    // In units of 2^-149: 2^85 value, and a subnormal has fewer than 2^23.
    let units = round(value * 3.8685626e25);
    return select(0u, u32(min(units, 8388608.0)), units < 8388608.0);
}

// On bits: WGSL compilers may assume that no float is NaN or infinite.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

fn is_finite(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7f800000u) != 0x7f800000u;
}

// gate / (1 + exp(-alpha gate)). Below -88 the exponential leaves f32: the quotient is -0 there, and
// NaN for -inf, which a WGSL compiler need not know; bits decide.
fn gate_times_sigmoid(gate: f32, alpha: f32) -> f32 {
    let exponent = -alpha * gate;
    let quotient = gate / (1.0 + exp(min(exponent, 88.0)));
    var bits = select(bitcast<u32>(quotient), 0x80000000u, exponent > 88.0);
    let gate_bits = bitcast<u32>(gate);
    bits = select(bits, 0x7fc00000u, gate_bits == 0xff800000u || (gate_bits & 0x7fffffffu) > 0x7f800000u);
    return bitcast<f32>(bits);
}

// `bounded`, but NaN where `value` is NaN: on bits, since a compiler may turn comparisons into min and max.
fn keep_nan(value: f32, bounded: f32) -> f32 {
    let bits = bitcast<u32>(value);
    return bitcast<f32>(select(bitcast<u32>(bounded), bits, (bits & 0x7fffffffu) > 0x7f800000u));
}

fn at_most(value: f32, limit: f32) -> f32 {
    return keep_nan(value, select(value, limit, value > limit));
}

fn within(value: f32, limit: f32) -> f32 {
    return keep_nan(value, select(select(value, limit, value > limit), -limit, value < -limit));
}

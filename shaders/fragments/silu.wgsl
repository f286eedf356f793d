// value / (1 + exp(-argument)). Where the exponential leaves f32 the quotient is -0, and NaN for a value of
// -inf, which a WGSL compiler need not know; bits decide.
fn times_sigmoid(value: f32, argument: f32) -> f32 {
    let quotient = value / (1.0 + exp(min(-argument, 88.0)));
    var bits = select(bitcast<u32>(quotient), 0x80000000u, argument < -88.0);
    let value_bits = bitcast<u32>(value);
    bits = select(bits, 0x7fc00000u, value_bits == 0xff800000u || (value_bits & 0x7fffffffu) > 0x7f800000u);
    return bitcast<f32>(bits);
}

// Nearest integer of a magnitude, ties to even, saturated, NaN to 0. Twin: numerics::encode_activation.
fn encode_code(sign: u32, magnitude: u32) -> u32 {
    let limit = 127u + sign;
    var code = 0u;
    if magnitude <= 0x7f800000u {
        let exponent = magnitude >> 23u;
        if exponent >= 134u {
            code = limit;
        } else if exponent >= 126u {
            let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
            let shift = 150u - exponent;
            code = min((mantissa + (1u << (shift - 1u)) - 1u + ((mantissa >> shift) & 1u)) >> shift, limit);
        }
    }
    return select(code, (256u - code) & 0xffu, sign == 1u);
}

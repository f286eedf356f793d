// The smallest power of two that is not below, up to 2^127. Twin: numerics::ceil_e8m0.
fn final_scale(raw: u32) -> u32 {
    if raw > INFINITE {
        return NAN_BITS;
    }
    let exponent = min((raw >> 23u) + select(0u, 1u, (raw & 0x7fffffu) != 0u), 254u);
    return exponent << 23u;
}

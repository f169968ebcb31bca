# SPDX-License-Identifier: Apache-2.0
"""`jai upcycle` and `jai snapshot`: a dense JAI becomes a mixture of experts."""

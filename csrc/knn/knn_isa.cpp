namespace urlfast {}
